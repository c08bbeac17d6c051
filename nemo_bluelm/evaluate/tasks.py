"""Tasks: files that say how a benchmark's records are asked and how the answers are scored; the data is the user's."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_bluelm import resources
from nemo_bluelm.config import translate
from nemo_bluelm.config.pipeline import check_keys, read_mapping, value_of
from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate.scorers import Score, Scorer, make_scorers
from nemo_bluelm.evaluate.template import compiled
from nemo_bluelm.generate.request import Sampling

MODES = ("think", "direct", "both")
_THOUGHT_END = "</think>"


@dataclass
class TaskSampling:
    """Of ``nemo_bluelm.generate.request.Sampling``, what a task may set."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    closing_text: str = ""
    stop: list[str] = field(default_factory=list)
    samples: int = 1
    seed: int = 0


@dataclass
class Task:
    """A task file.

    Attributes:
        prompt: Jinja template of the record's fields; ``{{ image }}`` is the place of the next image, without it all
            images come first. None: records are conversations as for training, whose last message is the answer.
        scorers: options by the scorer's name. The first that applies to a record scores its answer.
        max_new_tokens: of a reply, thought and answer together.
        mode: what is asked where the caller says nothing: think, direct or both.
    """

    name: str = MISSING
    prompt: Optional[str] = None
    scorers: dict[str, Any] = MISSING
    max_new_tokens: int = 2048
    mode: str = "both"
    sampling: TaskSampling = field(default_factory=TaskSampling)

    def settings(self) -> Sampling:
        """How the generator writes the replies.

        Raises:
            UserError: a value that makes no sense.
        """
        return Sampling(self.max_new_tokens, **{**vars(self.sampling), "stop": tuple(self.sampling.stop)})


class Marker:
    """Scores by the scorers of a task; a context that ends what they started."""

    def __init__(self, scorers: list[Scorer]):
        self.scorers = scorers

    def __enter__(self) -> "Marker":
        return self

    def __exit__(self, *_: Any) -> None:
        for scorer in self.scorers:
            scorer.close()

    def check(self, fields: Mapping[str, Any]) -> None:
        """
        Raises:
            UserError: no scorer applies to the record.
        """
        if not any(scorer.applies(fields) for scorer in self.scorers):
            names = ", ".join(f"{scorer.name} ({scorer.reference})" for scorer in self.scorers)
            raise UserError(f"none of the task's scorers applies to its fields {', '.join(fields)}: {names}")

    def score(self, answer: str, fields: Mapping[str, Any]) -> Score:
        """What is left of a think block is no part of an answer."""
        scorer = next(scorer for scorer in self.scorers if scorer.applies(fields))
        return scorer.score(answer.rpartition(_THOUGHT_END)[2], fields)


def packaged_tasks() -> list[str]:
    """Names of the packaged tasks, sorted."""
    return sorted(path.stem for path in (resources.conf_dir() / "tasks").glob("*.yaml"))


def load_task(name: str, overrides: list[str]) -> Task:
    """Read a task.

    Args:
        name: a task file, or a packaged task's name.
        overrides: ``key=value`` in Hydra's grammar; a key may go through mappings: ``scorers.judge.model=x``.

    Raises:
        UserError: what is wrong, in one line, with the nearest name that is right.
    """
    file = _find(name)
    content = read_mapping(file, name)
    schema = OmegaConf.structured(Task)
    check_keys(content, tuple(schema), name, "a task")
    for override in overrides:
        _set(content, override, name)
    check_keys(content.get("sampling") or {}, tuple(schema.sampling), f"{name}: sampling", "sampling")
    try:
        task: Task = OmegaConf.to_object(OmegaConf.merge(schema, {k: v for k, v in content.items() if v is not None}))
    except OmegaConfBaseException as error:
        raise UserError(f"{name}: {error.full_key}: {str(error).splitlines()[0]}") from error
    try:
        _check(task)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return task


def open_marker(task: Task) -> Marker:
    """The task's scorers.

    Raises:
        UserError: unknown scorers or options, a package that isn't installed.
    """
    return Marker(make_scorers(task.scorers, task.name))


def _check(task: Task) -> None:
    if not re.fullmatch(r"[\w.-]+", task.name):
        raise UserError(f"name is {task.name!r}; it must be a word, it names the file of the results")
    if not task.scorers:
        raise UserError("scorers is empty; name one at least, such as 'exact: {}'")
    if task.mode not in MODES:
        raise UserError(f"mode is {task.mode!r}; it must be one of {', '.join(MODES)}")
    if task.max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {task.max_new_tokens}; it must be 1 or more")
    if task.prompt is not None:
        compiled(task.prompt, "prompt")
    task.settings()


def _find(name: str) -> Path:
    path = Path(name)
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        return path
    names = packaged_tasks()
    if name in names:
        return resources.conf_dir() / "tasks" / f"{name}.yaml"
    if path.is_file() or path.suffix in (".yaml", ".yml") or "/" in name:
        what = "a task is a .yaml file" if path.is_file() else "no such file"
        raise UserError(f"{name}: {what}; packaged tasks: {', '.join(names)}")
    close = difflib.get_close_matches(name.lower(), names, 1, 0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UserError(f"{name}: no such task; {hint}packaged tasks: {', '.join(names)}")


def _set(content: dict[str, Any], override: str, name: str) -> None:
    """Apply one override to the mappings of a file."""
    value = value_of(override)
    *groups, last = translate.override_key(override).split(".")
    check_keys({(groups or [last])[0]: None}, tuple(OmegaConf.structured(Task)), override, "a task")
    at = content
    for number, group in enumerate(groups):
        if group not in at and groups[:number] == ["scorers"]:
            check_keys({group: None}, tuple(at), override, f"{name}'s scorers")
        if at.get(group) is None:
            at[group] = {}
        at = at[group]
        if not isinstance(at, dict):
            raise UserError(f"{override}: {'.'.join(groups[: number + 1])} is {at!r}, it has no keys of its own")
    at[last] = value
