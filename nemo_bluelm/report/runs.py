"""What runs left behind: metrics, events, validations, replies, evaluations, read for a report."""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

import yaml

from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.run_dir import METRICS_FILE, RECIPE_FILE, read_metrics

EVENTS_FILE, ENVIRONMENT_FILE, VALIDATION_FILE = "events.jsonl", "environment.json", "validation.jsonl"
ROLLOUTS_DIR, EVALUATION_FILE = "rollouts", "table.json"
SHOWN = 6  # replies of a GRPO run
_OF_A_STEP = ("tokens", "seconds", "mfu", "bad_samples")  # numbers, where a step has them
_EVENT = dict.fromkeys(("time", "event", "step", "detail"), "")  # of what other programs write, too
_REPLY = dict.fromkeys(("task_name", "step", "reward", "components", "reason", "messages", "thought", "answer"))
_OF_A_ROW = ("thinking_tokens", "answer_tokens", "problems")  # numbers of every row of an evaluation


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        name: as pages call it.
        recipe: every key resolved.
        steps: a dict a step, as ``metrics.jsonl`` has them.
        events: as ``events.jsonl``: starts, steps left out, hangs.
        environment: as ``environment.json``; empty for runs of earlier versions.
        validations, replies: of a GRPO run; the newest replies that it shows.
    """

    name: str
    folder: Path
    recipe: dict[str, Any]
    steps: list[dict[str, Any]]
    events: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    validations: list[dict[str, Any]] = field(default_factory=list)
    replies: list[dict[str, Any]] = field(default_factory=list)

    def key(self, dotted: str) -> Any:
        """The recipe's value of a key; None where there is none."""
        value: Any = self.recipe
        for part in dotted.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def values(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, without steps that have none."""
        pairs = [(row["step"], row[metric]) for row in self.steps if isinstance(row.get(metric), (int, float))]
        return [step for step, _ in pairs], [value for _, value in pairs]


@dataclass(frozen=True)
class Found:
    """What the folders of a report have.

    Attributes:
        together: the runs are to be compared; else they are stages of one pipeline.
        evaluations: rows of accuracy by thinking budget, by the name of the task.
    """

    title: str
    runs: list[Run]
    together: bool
    evaluations: dict[str, list[dict[str, Any]]]


def find_runs(folders: list[Path]) -> Found:
    """Read run folders, folders of runs (a pipeline's, a quickstart's), and results of ``eval``.

    Raises:
        UserError: a folder has nothing that a report can show, or files that can't be read.
    """
    runs: list[Run] = []
    evaluations: dict[str, list[dict[str, Any]]] = {}
    pipelines = 0
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; a report is made of run folders (outputs/runs/NAME)")
        evaluated = _evaluation(folder)
        if _is_run(folder):
            runs.append(read_run(folder))
            for result in sorted(folder.glob(f"*/{EVALUATION_FILE}")):
                evaluations |= _evaluation(result.parent)
        elif evaluated:
            evaluations |= evaluated
        else:
            below = folder / "runs" if (folder / "runs").is_dir() else folder
            stages = [path for path in below.iterdir() if path.is_dir() and _is_run(path)]
            if not stages:
                raise UserError(
                    f"{folder}: no run (it would have {METRICS_FILE}), no folder of runs and no result of eval; name "
                    "the run_dir of a recipe or pipeline"
                )
            pipelines += 1
            for stage in sorted(stages, key=_begun):
                runs.append(replace(read_run(stage), name=stage.name))
            if (folder / "report.json").is_file():
                if budgets := _read_json(folder / "report.json").get("budgets"):  # a quickstart's
                    evaluations["held-out problems"] = _rows(folder / "report.json", "budgets", budgets)
    names = [run.name for run in runs]
    if len(set(names)) < len(names):  # runs of one recipe: their folders tell them apart
        runs = [replace(run, name=str(run.folder)) for run in runs]
    if pipelines:
        title = f"{folders[0].resolve().name}, {len(runs)} runs"
    else:
        title = "Evaluation" if not runs else runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    return Found(title, runs, pipelines == 0, evaluations)


def read_run(folder: Path) -> Run:
    """
    Raises:
        UserError: a file can't be read.
    """
    try:
        recipe = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8")) if _has(folder, RECIPE_FILE) else {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / RECIPE_FILE} can't be read: {type(error).__name__}") from error
    steps = read_metrics(folder)
    if not steps:
        raise UserError(f"{folder / METRICS_FILE} has no step yet; try again when the run has written one")
    for number, row in enumerate(steps, 1):  # a line each
        if (key := _not_countable(row)) is not None:
            raise UserError(
                f"{folder / METRICS_FILE} line {number}: {key} is {str(row[key])[:40]!r}, which can't be added up; "
                "remove the line"
            )
    shown = sorted((folder / ROLLOUTS_DIR).glob("shown_*.jsonl"))[-1:]
    return Run(
        name=str((recipe or {}).get("name") or folder.name),
        folder=folder,
        recipe=recipe if isinstance(recipe, dict) else {},
        steps=steps,
        events=[_EVENT | row for row in _read_lines(folder / EVENTS_FILE)],
        environment=_read_json(folder / ENVIRONMENT_FILE) if _has(folder, ENVIRONMENT_FILE) else {},
        validations=[row for row in _read_lines(folder / VALIDATION_FILE) if _is_number(row.get("step"))],
        replies=_different([_REPLY | row for file in shown for row in _read_lines(file)])[:SHOWN],
    )


def _not_countable(row: dict[str, Any]) -> Optional[str]:
    """The key of a step that isn't what pages count with; None where all are."""
    for key in ("tokens_by_source", "loss_by_source"):
        by_source = row.get(key, {})
        if not isinstance(by_source, dict) or not all(map(_is_number, by_source.values())):
            return key
    return next((key for key in _OF_A_STEP if row.get(key) is not None and not _is_number(row[key])), None)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _different(replies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Replies without those that say what another said to the same prompt."""
    by_text = {json.dumps([row["messages"], row["thought"], row["answer"]]): row for row in replies}
    return list(by_text.values())


def _is_run(folder: Path) -> bool:
    return (folder / METRICS_FILE).is_file()


def _has(folder: Path, name: str) -> bool:
    return (folder / name).is_file()


def _begun(folder: Path) -> float:
    """When a run was begun: its first event's time sorts as text does, older runs by their recipe's time."""
    return (folder / RECIPE_FILE if _has(folder, RECIPE_FILE) else folder).stat().st_mtime


def _evaluation(folder: Path) -> dict[str, list[dict[str, Any]]]:
    if not _has(folder, EVALUATION_FILE):
        return {}
    tasks = _read_json(folder / EVALUATION_FILE).get("tasks")
    if not isinstance(tasks, dict):  # an ablation's
        return {}
    return {name: _rows(folder / EVALUATION_FILE, name, task) for name, task in tasks.items()}


def _rows(file: Path, name: str, task: Any) -> list[dict[str, Any]]:
    """The rows of a task, all with the numbers that a page shows."""
    rows = task.get("rows") if isinstance(task, dict) else task
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{file}: {name} has no rows; it was not written by eval")
    rows = [row | row.get("mode", {}) for row in rows]
    for number, row in enumerate(rows, 1):
        scored = () if row.get("accuracy") is None else ("accuracy", "low", "high")
        if lacking := [key for key in (*_OF_A_ROW, *scored) if not _is_number(row.get(key))]:
            raise UserError(f"{file}: row {number} of {name} has no number as {lacking[0]}; evaluate again")
    return [{"think": False, "budget": None, "accuracy": None} | row for row in rows]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} can't be read: {type(error).__name__}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is no mapping; it was not written by this program")
    return content


def _read_lines(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; a line that was cut off is none."""
    if not file.is_file():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
