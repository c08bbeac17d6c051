"""Pipelines: a file that lists stages in their order, each a recipe that goes on from the run of an earlier one."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from nemo_bluelm import resources
from nemo_bluelm.config import translate
from nemo_bluelm.config.keys import schema_keys
from nemo_bluelm.errors import UserError

_PIPELINE_KEYS, _STAGE_KEYS = ("name", "stages"), ("recipe", "overrides", "prune")
_RUN = re.compile(r"\$\{run:([^}]*)\}")
_NOT_FOR_ALL = ("init_from", "init_vision_from", "name")  # of each stage its own


@dataclass(frozen=True)
class Stage:
    """One stage: a training run, or the pruning of another stage's language model.

    Attributes:
        recipe: file or packaged name; of a pruning the student's.
        overrides: of the recipe, in Hydra's grammar; they set ``run_dir`` to ``folder``.
        folder: its run folder, or the checkpoint folder that a pruning makes.
        after: earlier stages whose folders it reads.
        teacher: the stage whose language model it prunes; None for a training run.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...]
    folder: Path
    after: tuple[str, ...]
    teacher: Optional[str] = None


@dataclass(frozen=True)
class Pipeline:
    name: str
    stages: tuple[Stage, ...]

    def stage(self, name: str) -> Stage:
        """The stage of a name."""
        return next(stage for stage in self.stages if stage.name == name)


def is_pipeline(path: str) -> bool:
    """Whether a recipe argument means a pipeline; False for a file that can't be read.

    Raises:
        UserError: as ``find_recipe``.
    """
    try:
        content = yaml.safe_load(resources.find_recipe(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(content, dict) and "stages" in content


def load_pipeline(path: str, overrides: list[str]) -> Pipeline:
    """Read a pipeline file.

    It has ``name`` and ``stages``, a mapping from each stage's name to ``{recipe: NAME, overrides: [...]}`` or
    ``{prune: STAGE, recipe: NAME, overrides: [...]}``. A recipe is a file beside the pipeline's, or what ``train``
    takes. In overrides ``${run:STAGE}`` is the folder of an earlier stage.

    Args:
        path: the file, or the name of a packaged pipeline.
        overrides: ``run_dir=DIR`` is the folder for the stages' folders (outputs/runs/NAME), ``STAGE.key=value`` is for
            one stage, all others are for every stage; they come after the file's.

    Raises:
        UserError: what is wrong with the file or an override, in one line.
    """
    file = resources.find_recipe(path)
    content = read_mapping(file, path)
    if "variants" in content:
        raise UserError(f"{path}: is an ablation; 'nemo-bluelm ablate {path}' runs it")
    check_keys(content, _PIPELINE_KEYS, path, "a pipeline")
    return read_stages(content, ("stages",), path, file.parent, overrides)


def read_mapping(file: Path, path: str) -> dict[Any, Any]:
    """The content of a pipeline's file; ``path`` is what the user called it.

    Raises:
        UserError: it can't be read, or is no mapping.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise translate.to_user_error(error, path, []) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a pipeline is a mapping of {', '.join(_PIPELINE_KEYS)}, this is {content!r}")
    return content


def read_stages(
    content: dict[str, Any], lists: tuple[str, ...], path: str, beside: Path, overrides: list[str]
) -> Pipeline:
    """The stages of a file, those of each list in their order; a stage refers to those of its own list and before.

    Args:
        content: of the file, with ``name`` and ``lists``.
        lists: keys of mappings from a stage's name to what it is.
        path: what the user called the file.
        beside: folder of the file, where its recipes may lie.
        overrides: as :func:`load_pipeline`.

    Raises:
        UserError: what is wrong, in one line.
    """
    name = content.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"{path}: name is {name!r}; it must be a word, it names the folder of the stages' runs")
    entries: list[tuple[str, Any]] = []
    for key in lists:
        listed = content.get(key)
        if not isinstance(listed, dict) or not listed:
            raise UserError(f"{path}: {key} must be a mapping of stages, such as 'sft: {{recipe: tiny/sft}}'")
        entries += listed.items()
    names = [stage for stage, _ in entries]
    for stage in names:
        _check_name(stage, path)
        if names.count(stage) > 1:
            raise UserError(f"{path}: stage {stage} is there twice, in {' and in '.join(lists)}; rename one")
    root, shared, own = _sort(overrides, names)
    root = root or Path("outputs/runs") / name
    found: list[Stage] = []
    for stage, entry in entries:
        where = f"{path}: stage {stage}"
        check_keys(entry, _STAGE_KEYS, where, "a stage")
        found.append(_stage(stage, entry, where, beside, root, [*shared, *own[stage]], found))
    return Pipeline(name, tuple(found))


def check_keys(content: Any, keys: Sequence[str], where: str, what: str) -> None:
    """Refuse anything but a mapping with some of the keys.

    Raises:
        UserError: naming ``where``, the key and the nearest one.
    """
    if not isinstance(content, dict):
        raise UserError(f"{where}: {what} is a mapping of {', '.join(keys)}, this is {content!r}")
    for key in content:
        if key not in keys:
            close = difflib.get_close_matches(str(key), keys, n=1)
            hint = f"did you mean {close[0]}?" if close else f"{what} has {', '.join(keys)}"
            raise UserError(f"{where}: unknown key {key}; {hint}")


def quoted(path: Path | str) -> str:
    """A value in the grammar of overrides, whatever characters it has."""
    escaped = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def value_of(override: str) -> Any:
    """What an override sets its key to.

    Raises:
        UserError: it is none.
    """
    try:
        return OverridesParser.create().parse_overrides([override])[0].value()
    except OverrideParseException as error:
        raise translate.to_user_error(error, override, [override]) from error


def _stage(
    name: str, entry: dict[str, Any], where: str, beside: Path, root: Path, given: list[str], earlier: list[Stage]
) -> Stage:
    recipe, listed, teacher = entry.get("recipe"), entry.get("overrides", []), entry.get("prune")
    if not isinstance(recipe, str):
        raise UserError(f"{where}: recipe is {recipe!r}; it must be a recipe file, or the name of a packaged recipe")
    if not isinstance(listed, list) or not all(isinstance(entry, str) for entry in listed):
        raise UserError(f"{where}: overrides must be a list of texts such as - optim.lr=1e-4, it is {listed}")
    for override in listed:
        if translate.override_key(override) == "run_dir":
            raise UserError(f"{where}: {override}: the pipeline's run_dir holds its stages' folders; leave it out")
    if teacher is not None and not isinstance(teacher, str):
        raise UserError(f"{where}: prune is {teacher!r}; it must be the name of an earlier stage")
    folders = {stage.name: stage for stage in earlier}
    read = [match[1] for override in [*listed, *given] for match in _RUN.finditer(override)]
    for other in ([] if teacher is None else [teacher]) + read:
        if other not in folders:
            known = f"earlier ones are {', '.join(folders)}" if folders else "it is the first one"
            raise UserError(f"{where} refers to stage {other}, which does not stand before it; {known}")
    if teacher is not None and folders[teacher].teacher is not None:
        raise UserError(f"{where}: prune is {teacher}, which is a pruning itself; name a training run")
    beside = beside / f"{recipe.removesuffix('.yaml')}.yaml"
    folder = root / name
    overrides = [_with_folders(override, folders) for override in [*listed, *given]]
    return Stage(
        name,
        str(beside) if beside.is_file() else recipe,
        (*overrides, f"run_dir={quoted(folder)}"),
        folder,
        tuple(dict.fromkeys(([] if teacher is None else [teacher]) + read)),
        teacher,
    )


def _with_folders(override: str, stages: dict[str, Stage]) -> str:
    """``${run:STAGE}`` as that stage's folder. A value with one is a path, and quoted whole."""
    if not _RUN.search(override):
        return override
    key, _, value = override.partition("=")
    return f"{key}={quoted(_RUN.sub(lambda match: str(stages[match[1]].folder), value.strip(chr(39) + chr(34))))}"


def _sort(overrides: list[str], stages: list[str]) -> tuple[Optional[Path], list[str], dict[str, list[str]]]:
    """The command line's overrides: the folder of the stages, those for all stages, those for one."""
    root, shared, own = None, [], {stage: [] for stage in stages}
    for override in overrides:
        key = translate.override_key(override)
        first, _, rest = key.partition(".")
        sign = override[: len(override) - len(override.lstrip("+~"))]
        if first in own and rest:
            own[first].append(sign + override.removeprefix(sign).removeprefix(f"{first}."))
        elif key == "run_dir":
            root = Path(str(value_of(override) or ""))
            if not root.name:
                raise UserError(f"{override}: run_dir is empty; it must be a path")
        elif key in _NOT_FOR_ALL:
            raise UserError(f"{override}: each stage has its own {key}; for one stage say {stages[0]}.{override}")
        else:
            shared.append(override)
    return root, shared, own


def _check_name(stage: Any, path: str) -> None:
    if not isinstance(stage, str) or not re.fullmatch(r"\w+", stage):
        raise UserError(f"{path}: stage {stage!r}: a stage's name is made of letters, digits and _")
    if stage in schema_keys():
        raise UserError(f"{path}: stage {stage}: a recipe has a key of this name; choose another")
