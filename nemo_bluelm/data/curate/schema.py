"""The curation recipe: typed blocks, one dataclass of parameters per step, and its errors in one line."""

import dataclasses
import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from nemo_bluelm.data.curate.steps import STEPS, Step
from nemo_bluelm.errors import UserError


class Executor(Enum):
    """Where the pipeline's tasks run."""

    local = "local"
    slurm = "slurm"


@dataclass
class InputConfig:
    """WebDataset tars or JSONL files: names or globs relative to ``root``, a folder or anything fsspec opens."""

    shards: list[str] = MISSING
    root: str = "."


@dataclass
class SlurmConfig:
    """One job array per stage, each after the one before. ``sbatch``: further directives, by name."""

    partition: str = MISSING
    time: str = "24:00:00"
    cpus_per_task: int = 1
    mem_per_cpu_gb: int = 4
    running: int = -1  # tasks at a time; -1: no limit
    max_array_size: int = 1001  # the cluster's MaxArraySize
    qos: str = ""
    setup: str = ""  # shell command before each task, to put nemo-bluelm's environment on PATH
    sbatch: dict[str, str] = field(default_factory=dict)


@dataclass
class ExecutorConfig:
    kind: Executor = Executor.local
    workers: int = 1  # local processes
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


class Unit(Enum):
    """What a share is a share of: the tokenizer's tokens aren't known here, words follow those of plain text."""

    words = "words"
    records = "records"


@dataclass
class ResampleConfig:
    """Wanted shares by tag; with shares, ``resample.yaml`` tells the factors for the training recipe."""

    shares: dict[str, float] = field(default_factory=dict)
    unit: Unit = Unit.words
    source: str = ""  # name of the source in the training recipe; default: the recipe's name


@dataclass
class CurationRecipe:
    """``steps`` maps the name of a step to its parameters; they run in this order, ``off`` leaves one out."""

    name: str = MISSING
    output: str = MISSING
    input: InputConfig = field(default_factory=InputConfig)
    tasks: int = 1  # shards of the work; task i reads input shards i, i + tasks, ...
    samples_per_shard: int = 10_000
    keep_dropped: bool = True
    steps: dict[str, Any] = MISSING
    resample: ResampleConfig = field(default_factory=ResampleConfig)
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> CurationRecipe:
    """The recipe with its steps as :class:`Step` instances.

    Args:
        overrides: ``key=value``, dotted keys.

    Raises:
        UserError: the file is no recipe, a key, step or value is unknown or missing; in one line.
    """
    content = _read(path)
    try:
        changes = OmegaConf.merge({}, *map(_change, overrides))
        config = OmegaConf.merge(OmegaConf.structured(CurationRecipe), content, changes)
        missing = sorted(OmegaConf.missing_keys(config))
        if config.executor.kind is Executor.local:
            missing = [key for key in missing if not key.startswith("executor.slurm.")]
        if missing:
            raise UserError(f"{path}: {missing[0]} is mandatory and not set; set it in the recipe or as key=value")
        steps = {name: _step(config, name) for name in config.steps if config.steps[name] is not False}
        config.executor.slurm.partition = OmegaConf.select(config, "executor.slurm.partition") or ""
        config.steps = {}
        recipe = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise _to_user_error(error, path) from error
    recipe.steps = steps
    _check(recipe, path)
    return recipe


def to_dict(recipe: CurationRecipe) -> dict:
    """What decides on the output, as plain values: the recipe without the executor."""
    plain = dataclasses.asdict(recipe)
    del plain["executor"]
    plain["resample"]["unit"] = recipe.resample.unit.value
    return plain | {"order of steps": list(recipe.steps)}


def _read(path: str | Path) -> DictConfig:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"{path}: {where}not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a curation recipe is a mapping of keys; it has {', '.join(_fields(CurationRecipe))}")
    return OmegaConf.create(content)


def _change(override: str) -> DictConfig:
    if "=" not in override.lstrip("="):
        raise UserError(f"{override}: an override is key=value, for example output=outputs/clean")
    try:
        return OmegaConf.from_dotlist([override])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{override}: the value is not valid YAML; a list is key=[a,b]") from error


def _step(config: DictConfig, name: str) -> Step:
    if name not in STEPS:
        raise UserError(f"steps.{name}: no such step; {_did_you_mean(name, STEPS)}")
    parameters = config.steps[name]
    if parameters is not None and not isinstance(parameters, DictConfig):
        raise UserError(f"steps.{name} is {parameters!r}; it must be a mapping of {', '.join(_fields(STEPS[name]))}")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(STEPS[name]), parameters or {}))
    except (OmegaConfBaseException, UserError) as error:
        if isinstance(error, UserError):
            raise UserError(f"steps.{name}.{error}") from error
        raise _to_user_error(error, "", f"steps.{name}", STEPS[name]) from error


def _check(recipe: CurationRecipe, path: str | Path) -> None:
    if not re.fullmatch(r"[\w-]+", recipe.name):
        raise UserError(f"{path}: name is {recipe.name!r}; it begins the shards' names: letters, digits, _ and -")
    for key, value in (
        ("tasks", recipe.tasks),
        ("samples_per_shard", recipe.samples_per_shard),
        ("executor.workers", recipe.executor.workers),
    ):
        if value < 1:
            raise UserError(f"{path}: {key} is {value}; it must be 1 or more")
    if not recipe.steps:
        raise UserError(f"{path}: steps is empty; choose from {', '.join(STEPS)}")
    shares = recipe.resample.shares
    for tag, share in shares.items():
        if not 0 < share < 1:
            raise UserError(f"{path}: resample.shares.{tag} is {share}; it must be above 0 and below 1")
    if sum(shares.values()) >= 1:
        raise UserError(f"{path}: resample.shares add up to {sum(shares.values()):g}; leave something for the rest")


def _to_user_error(error: OmegaConfBaseException, path, prefix: str = "", cls: type = CurationRecipe) -> UserError:
    where = f"{path}: " if path else ""
    key = ".".join(part for part in (prefix, error.full_key) if part)
    first = str(error).split("\n", 1)[0]
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        owner = error.parent_node._metadata.object_type if error.parent_node is not None else cls
        fields = _fields(owner) if dataclasses.is_dataclass(owner) else _fields(cls)
        return UserError(f"{where}unknown key {key}; {_did_you_mean(key.rsplit('.', 1)[-1], fields)}")
    if "is not a ListConfig" in first:
        first = "it must be a list: [a, b]"
    elif wrong := re.match(r"Cannot assign (\w+) to Dict", first):
        first = f"it must be a mapping, not {wrong[1]}"
    return UserError(f"{where}{key}: {first}")


def _fields(cls: type) -> list[str]:
    return [item.name for item in dataclasses.fields(cls)]


def _did_you_mean(word: str, choices: Iterable[str]) -> str:
    choices = list(choices)
    close = difflib.get_close_matches(word, choices, n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(choices) or 'none'}"
