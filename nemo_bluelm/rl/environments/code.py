"""Programs in Python: whether they pass the tests of their record, run in a jail."""

import ast
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional, Union

from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate.scorers.base import Score
from nemo_bluelm.rl.environments.base import Episode, RewardFunction
from nemo_bluelm.rl.environments.registry import register_reward
from nemo_bluelm.rl.environments.sandbox import (
    ISOLATIONS,
    Jailed,
    Limits,
    SandboxError,
    check_isolation,
    pump,
    run,
)

COUNTS = ("all", "share")
_HARNESS = Path(__file__).with_name("code_harness.py")
_FENCE = re.compile(r"^```[ \t]{0,8}(?:python3?|py)?[ \t]{0,8}\r?\n(.*?)^```", re.DOTALL | re.MULTILINE | re.IGNORECASE)
_LONGEST = 1 << 19  # characters of a program; as bytes they fit into the least disk there is
_MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Case:
    """What a program reads and what it must print."""

    input: str
    output: str


@register_reward("code")
@dataclass
class Code(RewardFunction):
    """Unit tests of the Python program that the answer has last in a fence; an answer without one is the program.

    Tests are mappings {"input": ..., "output": ...}, of what is read and printed, or texts of assertions such as
    "assert add(1, 2) == 3", which may define functions of their own; {"inputs": [...], "outputs": [...]} is a list of
    the former. What a program must print or return never enters the jail that it runs in: a test's assertions run in
    another one, and its calls of the program's functions are carried over, arguments and results as plain data (so an
    assertion sees no change that a function made to its arguments).

    Attributes:
        reference: field with the list of tests, or a text of JSON.
        count: ``all``: 1 if every test passes, the first that fails ends it; ``share``: of the tests.
        time_limit: seconds for each program run: for each input, or for all assertions.
        total_limit: seconds for an answer; what is not done by then has failed.
        memory: megabytes of each process. processes: of them and threads at a time. disk, output: megabytes written.
        isolation: ``strong``, or ``weak`` for the limits alone, see ``sandbox.Limits``.
    """

    reference: str = "tests"
    count: str = "all"
    time_limit: float = 5.0
    total_limit: float = 15.0
    memory: int = 512
    processes: int = 8
    disk: int = 32
    output: int = 1
    isolation: str = "strong"

    def check(self) -> None:
        for name, choices in (("count", COUNTS), ("isolation", ISOLATIONS)):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")
        for name, least in (("memory", 64), ("processes", 1), ("disk", 4), ("output", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be {least} or more")
        if not 0 < self.time_limit <= self.total_limit < float("inf"):
            raise UserError(
                f"time_limit is {self.time_limit} and total_limit {self.total_limit}; both must be more than 0 "
                "seconds, and the former not more than the latter"
            )
        check_isolation(self.isolation)

    def longest(self) -> float:
        return self.total_limit

    def score(self, episode: Episode) -> Score:
        tests = _tests(episode.fields.get(self.reference))
        if isinstance(tests, str):
            return Score(None, f"the record's {self.reference}: {tests}")
        program = program_of(episode.answer)
        if not program.strip() or len(program) > _LONGEST:
            return Score(0.0, "no program, or one that is too long")
        begun = time.monotonic()
        assertions = [test for test in tests if isinstance(test, str)]
        cases = [test for test in tests if isinstance(test, Case)]
        try:
            failed, reason, timed_out = self._run_assertions(program, assertions) if assertions else (0, "", False)
            for case in cases:
                if failed and self.count == "all":
                    break
                left = self.total_limit - (time.monotonic() - begun)
                wrong = self._run(program, case, min(self.time_limit, left)) if left > 0 else "time"
                failed, reason, timed_out = failed + bool(wrong), reason or wrong, timed_out or wrong == "time"
        except SandboxError as error:
            return Score(None, str(error))
        value = 1 - failed / len(tests) if self.count == "share" else float(not failed)
        return Score(value, f"a test failed: {reason}" if failed else "", timed_out=timed_out)

    def _limits(self, seconds: float) -> Limits:
        memory, disk, output = (size * _MEGABYTE for size in (self.memory, self.disk, self.output))
        return Limits(seconds, memory, self.processes, disk, output, self.isolation)

    def _run(self, program: str, case: Case, seconds: float) -> str:
        """Why the program fails a case, if it does."""
        files = {"main.py": program}
        outcome = run(files, ["main.py"], self._limits(seconds), case.input.encode(errors="surrogatepass"))
        if not outcome.clean:
            return outcome.ended if outcome.ended != "exit" else f"exit {outcome.code}"
        same = _lines(outcome.output.decode(errors="replace")) == _lines(case.output)
        return "" if same else "other output"

    def _run_assertions(self, program: str, snippets: list[str]) -> tuple[int, str, bool]:
        """How many fail, why, and whether time ran out."""
        limits, harness = self._limits(self.time_limit), _HARNESS.read_text(encoding="utf-8")
        others = replace(limits, seconds=self.time_limit + 1)  # the tests' side outlives the program's
        files = {"harness.py": harness, "tests.json": json.dumps(snippets)}
        with (
            Jailed(files, ["harness.py", "tests"], others) as tests,
            Jailed({"harness.py": harness, "program.py": program}, ["harness.py", "program"], limits) as ran,
        ):
            verdict: list[bool] = []
            heard = {tests: b"", ran: b""}

            def carry(side: Jailed, piece: bytes) -> None:
                if not piece and side is ran:
                    tests.ends_input = True
                *lines, heard[side] = (heard[side] + piece).split(b"\n")
                for line in lines:
                    if side is ran:
                        tests.pending.extend(line + b"\n")
                    elif line.startswith(b"?"):
                        ran.pending.extend(line[1:] + b"\n")
                    else:
                        verdict.extend(json.loads(line[1:]))

            pump([tests, ran], carry)
            ended = tests.finish().ended
            ran.kill()
            timed_out = "time" in (ended, ran.finish().ended)
        failed = len(snippets) - sum(verdict)
        return failed, "time" if timed_out else "an assertion", timed_out


def program_of(answer: str) -> str:
    """The program in an answer: what is in its last fence, or all of it where there is none."""
    fenced = _FENCE.findall(answer)
    return fenced[-1] if fenced else answer


def _tests(given: Any) -> Union[list[Union[Case, str]], str]:
    """The tests of a record, or what is wrong with them."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            given = [given]
    if isinstance(given, Mapping) and isinstance(given.get("inputs"), list) and isinstance(given.get("outputs"), list):
        if len(given["inputs"]) != len(given["outputs"]):
            return "it has not as many outputs as inputs"
        given = [{"input": one, "output": other} for one, other in zip(given["inputs"], given["outputs"])]
    if not isinstance(given, list) or not given:
        return "it is no list of tests"
    tests = [_test(item) for item in given]
    return next((f"{item!r:.60} is no test" for item, test in zip(given, tests) if test is None), None) or tests


def _test(item: Any) -> Optional[Union[Case, str]]:
    if isinstance(item, Mapping):
        both = item.get("input"), item.get("output")
        return Case(*both) if all(isinstance(text, str) for text in both) else None
    try:
        ast.parse(item)
        return item
    except (SyntaxError, TypeError, ValueError):
        return None


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
