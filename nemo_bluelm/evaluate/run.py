"""Asks a task's problems in every mode and writes each result at once, so that a run cut off goes on where it was."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Optional

from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate.budgets import Result, Row, summarize
from nemo_bluelm.evaluate.modes import TOKENS_AT_ONCE, ThinkMode, batches, prompt_length
from nemo_bluelm.evaluate.samples import Sample, Skipped, read_samples
from nemo_bluelm.evaluate.scorers.base import Score
from nemo_bluelm.evaluate.tasks import Marker, Task, open_marker
from nemo_bluelm.generate.generator import Generator
from nemo_bluelm.generate.request import Prompt, Sampling

_WINDOW = 256  # samples that are held at a time, and batched by their lengths
_SCORERS = 8  # answers that are scored at a time
_CONNECTION = ("base_url", "api_key_env", "timeout", "retries")  # options of a judge that don't change its verdict

Key = tuple[str, bool, Optional[int], int]
_FIELDS = tuple(entry.name for entry in fields(Result))


@dataclass
class Outcome:
    """What an evaluation found.

    Attributes:
        rows: one for each mode.
        skipped: records that could not be asked.
        reasons: how often each reason for an unscored reply came.
    """

    task: str
    rows: list[Row]
    skipped: list[Skipped]
    reasons: dict[str, int] = field(default_factory=dict)


class Results:
    """A file of results, a JSON line each after a first line with the settings that they were made with.

    Args:
        settings: JSON-ready; results made with others are refused.

    Raises:
        UserError: the file belongs to other settings, or can't be read or written.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self._settings = path, json.loads(json.dumps(settings))
        self._found: dict[Key, Result] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b")
            self._read()
        except OSError as error:
            raise UserError(f"--out: {path} can't be written: {error.strerror}; choose another folder") from error

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def get(self, key: str, mode: ThinkMode, sample: int) -> Optional[Result]:
        return self._found.get((key, mode.think, mode.budget, sample))

    def add(self, results: Sequence[Result]) -> None:
        """Keep them; a later result of one reply replaces an earlier one."""
        for result in results:
            self._found[result.key, result.think, result.budget, result.sample] = result
        self._write("".join(_line(asdict(result)) for result in results))

    def _write(self, text: str) -> None:
        try:
            self._file.write(text.encode())
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.path} can't be written: {error.strerror}; free space and run it again") from error

    def _read(self) -> None:
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file):
            if not line.endswith(b"\n"):
                break  # cut off while it was written
            self._take(number, line)
            whole += len(line)
        self._file.truncate(whole)
        if not whole:
            self._write(_line({"settings": self._settings}))

    def _take(self, number: int, line: bytes) -> None:
        try:
            content = json.loads(line)
            if number:
                result = Result(**{name: content[name] for name in _FIELDS})
                self._found[result.key, result.think, result.budget, result.sample] = result
                return
            made_with = content["settings"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{self.path}: line {number + 1} is no result; choose another --out or remove it"
            ) from error
        for name, value in self._settings.items():
            if made_with.get(name) != value:
                raise UserError(
                    f"{self.path} has results of another {name}; choose another --out, or remove the file to begin anew"
                )


def run_task(
    generator: Generator,
    task: Task,
    data: Sequence[str],
    modes: Sequence[ThinkMode],
    out: Path,
    checkpoint: Path,
    limit: Optional[int] = None,
    tokens_at_once: int = TOKENS_AT_ONCE,
    progress: Callable[[str], None] = print,
) -> Outcome:
    """Ask what isn't answered yet, score it, and summarize all of it.

    Args:
        data: files, as ``nemo_bluelm.evaluate.samples.find_data`` gives them.
        out: folder of the results, ``TASK.jsonl``.
        checkpoint: what the generator was opened on; results of another one are refused.
        limit: problems at most, the first ones.
        progress: told what was skipped and how far it is.

    Raises:
        UserError: the results can't be kept, or belong to other settings; a budget without room for an answer.
    """
    samplings = [mode.sampling(task.settings()) for mode in modes]
    skipped: list[Skipped] = []
    done: dict[ThinkMode, list[Result]] = {mode: [] for mode in modes}
    settings = _settings(task, checkpoint)
    with open_marker(task) as marker, Results(out / f"{task.name}.jsonl", settings) as results:
        samples = islice(_good(read_samples(data, task, marker), skipped, progress), limit)
        asked = 0
        for number, window in enumerate(_windows(samples)):
            window = _answerable(generator, window, results, modes, task, skipped, progress)
            asked += len(window)
            for mode, sampling in zip(modes, samplings):
                lengths = [length for _, length in window]
                some = batches(lengths, sampling.max_new_tokens, sampling.samples, tokens_at_once)
                for batch, places in enumerate(some):
                    # Of its own for each batch, and the same when it is asked again.
                    seeded = replace(sampling, seed=(sampling.seed * 1_000_003 + number) * 1_000_003 + batch)
                    ask = [window[place][0] for place in places]
                    done[mode] += _answers(generator, ask, mode, seeded, results, marker)
                progress(f"{task.name}: {mode.label}: {asked} problems")
    if not asked:
        why = f": {skipped[0].where}: {skipped[0].reason}" if skipped else ""
        raise UserError(f"{task.name}: no problem in {', '.join(data)} can be asked{why}")
    unscored = [result.reason for of in done.values() for result in of if result.score is None]
    reasons = {reason: unscored.count(reason) for reason in dict.fromkeys(unscored)}
    return Outcome(task.name, [summarize(mode, of) for mode, of in done.items()], skipped, reasons)


def _good(
    read: Iterator[Sample | Skipped], skipped: list[Skipped], progress: Callable[[str], None]
) -> Iterator[Sample]:
    for sample in read:
        if isinstance(sample, Sample):
            yield sample
        else:
            _skip(sample, skipped, progress)


def _skip(what: Skipped, skipped: list[Skipped], progress: Callable[[str], None]) -> None:
    skipped.append(what)
    progress(f"skipped {what.where}: {what.reason}")


def _windows(samples: Iterator[Sample]) -> Iterator[list[Sample]]:
    while window := list(islice(samples, _WINDOW)):
        yield window


def _answerable(
    generator: Generator,
    window: list[Sample],
    results: Results,
    modes: Sequence[ThinkMode],
    task: Task,
    skipped: list[Skipped],
    progress: Callable[[str], None],
) -> list[tuple[Sample, int]]:
    """The samples whose images can be decoded, with the tokens of their prompts; all of a window that is done."""
    keys = [
        (sample.key, mode, number) for sample in window for mode in modes for number in range(task.sampling.samples)
    ]
    if all(results.get(*key) for key in keys):
        return [(sample, 1) for sample in window]
    found = []
    for sample in window:
        try:
            found.append((sample, prompt_length(generator, Prompt(sample.messages, sample.images, think=True))))
        except UserError as error:
            _skip(Skipped(sample.where, str(error)), skipped, progress)
    return found


def _answers(
    generator: Generator, asked: list[Sample], mode: ThinkMode, sampling: Sampling, results: Results, marker: Marker
) -> list[Result]:
    """Results of a batch: what is kept, scored again where that may help, and what is new."""
    slots = [(sample, number) for sample in asked for number in range(sampling.samples)]
    found = [results.get(sample.key, mode, number) for sample, number in slots]
    missing = [n for n, result in enumerate(found) if result is None]
    retry = [n for n, result in enumerate(found) if result is not None and result.passing]
    if missing:
        # The whole batch even if one is missing: what is drawn for a reply depends on its place.
        replies = generator.generate([Prompt(sample.messages, sample.images, mode.think) for sample in asked], sampling)
        scores = _scores(marker, [(replies[n].answer, slots[n][0].fields) for n in missing])
        for n, score in zip(missing, scores):
            sample, number = slots[n]
            found[n] = Result.of(sample.key, mode, number, replies[n], score)
    scores = _scores(marker, [(found[n].answer, slots[n][0].fields) for n in retry])
    for n, score in zip(retry, scores):
        found[n] = replace(found[n], score=score.value, reason=score.reason, passing=score.passing)
    results.add([found[n] for n in sorted({*missing, *retry})])
    return found


def _scores(marker: Marker, answers: list[tuple[str, dict[str, Any]]]) -> list[Score]:
    with ThreadPoolExecutor(_SCORERS) as pool:
        return list(pool.map(lambda pair: marker.score(*pair), answers))


def _settings(task: Task, checkpoint: Path) -> dict[str, Any]:
    """What results depend on, but for the number of problems and the modes."""
    scorers = {
        name: {key: value for key, value in (options or {}).items() if key not in _CONNECTION}
        for name, options in task.scorers.items()
    }
    return {
        "checkpoint": f"{checkpoint} of {os.stat(checkpoint).st_mtime_ns}",
        "prompt": task.prompt,
        "scorers": scorers,
        "max_new_tokens": task.max_new_tokens,
        "sampling": asdict(task.sampling),
    }


def _line(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=True) + "\n"
