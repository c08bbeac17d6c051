"""Numbers and formulas: right where math-verify finds them equal, within a time limit."""

import json
import os
import selectors
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate.scorers.base import Score, Scorer, last_boxed, need
from nemo_bluelm.evaluate.scorers.claims import without_denied_numbers

_WORKER = "nemo_bluelm.evaluate.scorers.mathematics_worker"
_PACKAGE_ROOT = Path(__file__).resolve().parents[3]  # also where the package is not installed but on the path
_START = 60  # seconds until a worker has imported sympy


@dataclass
class Math(Scorer):
    r"""1 if the answer equals a reference by math-verify: a number, a formula, a set, an interval.

    The last ``\boxed{}`` counts if there is one, else what math-verify finds last, without what the answer says it is
    not ("not 7"). Of a reference like GSM8K's, with the solution before ``####``, what follows counts. The comparison
    runs in a process of its own that is ended after the time limit: an answer that takes longer is wrong.

    Attributes:
        time_limit: seconds for an answer.
    """

    name = "math"
    time_limit: float = 5.0

    def __post_init__(self):
        self._worker: Optional[_Worker] = None
        self._lock = threading.Lock()

    def check(self) -> None:
        need("math_verify", "the scorer math")
        if not 0 < self.time_limit < float("inf"):
            raise UserError(f"time_limit is {self.time_limit}; it must be greater than 0 seconds")

    def open(self) -> None:
        with self._lock:
            self._started()

    def longest(self) -> float:
        return self.time_limit

    def score(self, answer: str, fields: Mapping[str, Any]) -> Score:
        references = [text.rsplit("####", 1)[-1].strip() for text in self.references(fields)]
        boxed = last_boxed(answer)
        said = without_denied_numbers(answer) if boxed is None else f"\\boxed{{{boxed}}}"
        question = {"references": references, "answer": said}
        with self._lock:
            found = self._ask(question)
        if found is None:
            return Score(0.0, f"it could not be compared within {self.time_limit:g} s", timed_out=True)
        if "failed" in found:
            return Score(None, f"math-verify failed with {found['failed']}")
        if "right" not in found:
            return self.no_reference(fields, "a number or formula")
        return Score(float(found["right"]), "" if found["any"] else "no number or formula in it")

    def close(self) -> None:
        with self._lock:
            if self._worker:
                self._worker.kill()
            self._worker = None

    def _started(self) -> "_Worker":
        if self._worker is None:
            self._worker = _Worker(self.time_limit)
        return self._worker

    def _ask(self, question: dict) -> Optional[dict]:
        found = self._started().ask(question, self.time_limit)
        if found is None:
            self._worker.kill()
            self._worker = None
        return found


class _Worker:
    """A process that answers a line of JSON with a line of JSON.

    Args:
        seconds: for an answer; it ends by itself where nobody is left to end it.
    """

    def __init__(self, seconds: float):
        path = os.pathsep.join(filter(None, (str(_PACKAGE_ROOT), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", _WORKER, str(seconds)]
        env = {**os.environ, "PYTHONPATH": path}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, env=env, **pipes)
        if self._line(_START) is None:
            self.kill()
            raise UserError(f"the scorer math did not start within {_START} s; see 'python -m {_WORKER}'")

    def ask(self, question: dict, seconds: float) -> Optional[dict]:
        """Its answer, or None if it takes longer or dies."""
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        line = self._line(seconds)
        return None if line is None else json.loads(line)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def _line(self, seconds: float) -> Optional[bytes]:
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                return None
        return self._process.stdout.readline() or None  # its lines are short and written at once
