"""From a recipe file and ``key=value`` overrides to a typed Recipe, through Hydra's compose API."""

import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_bluelm import resources
from nemo_bluelm.config import translate
from nemo_bluelm.config.aliases import renamed
from nemo_bluelm.config.schema import Recipe, SourceConfig
from nemo_bluelm.errors import UserError

# Hydra starts from a config in memory that lists the typed schema first and the recipe second, so no recipe can
# forget the schema and every key of every block is checked where it is merged.
_ROOT, _SCHEMA = "nemo_bluelm_root", "nemo_bluelm_schema"

CHECKPOINTS = ("init_from", "init_vision_from", "distill.teacher")  # keys that name a run or checkpoint folder
NO_CHECKPOINTS = tuple(f"{key}=null" for key in CHECKPOINTS)  # overrides, for uses of a recipe that read none


def compose(path: str, overrides: list[str]) -> DictConfig:
    """The typed, composed recipe, its mandatory values perhaps still missing.

    Args:
        path: a recipe file, or the name of a packaged recipe.
        overrides: Hydra overrides: ``key=value``, ``block=option``, ``+key=value``, ``~key``.

    Raises:
        UserError: whatever is wrong with the file, a block or an override, in one line.
    """
    file = resources.find_recipe(path)
    content = _read(file, path)
    overrides = renamed(overrides)
    _check_overrides(overrides)
    store = ConfigStore.instance()
    store.store(name=_SCHEMA, node=Recipe)
    store.store(
        name=_ROOT,
        node={
            "defaults": [_SCHEMA, file.stem, "_self_"],
            "hydra": {"searchpath": [f"file://{resources.conf_dir()}"]},
        },
    )
    GlobalHydra.instance().clear()
    try:
        # Hydra's warnings are about its own older versions; what matters to a user is raised.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with initialize_config_dir(config_dir=str(file.parent), version_base="1.3"):
                config = hydra_compose(config_name=_ROOT, overrides=overrides)
        # Hydra's "+key=value" opens the schema; merging into a closed one refuses what the schema doesn't know.
        config = OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.to_container(config))
    # Hydra also raises bare ValueError, AssertionError and RecursionError for what a user wrote; whatever comes from
    # composing is about the recipe, and the original error stays attached.
    except Exception as error:
        raise translate.to_user_error(error, path, overrides) from error
    _demand(config, content, overrides)
    return config


def load_recipe(path: str, overrides: list[str]) -> Recipe:
    """The complete recipe as dataclass instances, interpolations resolved.

    Raises:
        UserError: as ``compose``, and when a mandatory value is missing.
    """
    return to_recipe(compose(path, overrides), path)


def to_recipe(config: DictConfig, path: str) -> Recipe:
    """A composed recipe as dataclass instances.

    Raises:
        UserError: a mandatory value is missing or an interpolation has no target.
    """
    missing = missing_keys(config, path)
    if missing:
        example = "[...]" if missing[0] == "data.sources" or missing[0].endswith(".shards") else "..."
        raise UserError(
            f"{path}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} mandatory and not set; "
            f"set {'it' if len(missing) == 1 else 'them'} in the recipe or as {missing[0]}={example}"
        )
    try:
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise translate.to_user_error(error, path, []) from error


def load_without_data(path: str, overrides: list[str]) -> tuple[Recipe, list[str], dict]:
    """The recipe for uses that read nothing: (recipe, missing keys, resolved config with ``???`` where missing).

    Missing values of ``data`` and missing checkpoints (:data:`CHECKPOINTS`) are filled with stand-ins.

    Raises:
        UserError: as ``load_recipe``, for every other key.
    """
    config = compose(path, overrides)
    found = missing_keys(config, path)
    missing = [key for key in found if key.startswith("data.") or key in CHECKPOINTS]
    try:
        plain = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    except OmegaConfBaseException as error:
        raise translate.to_user_error(error, path, overrides) from error
    for key in missing:
        if key == "data.sources":
            stand_in = {"unset": SourceConfig(shards=["unset"])}
        else:
            stand_in = ["unset"] if key.endswith(".shards") else "unset"
        OmegaConf.update(config, key, stand_in)
    return to_recipe(config, path), missing, plain


def missing_keys(config: DictConfig, path: str) -> list[str]:
    """Full dotted keys that are mandatory and not set, sorted.

    Raises:
        UserError: an interpolation has no target.
    """
    try:
        return sorted(OmegaConf.missing_keys(config))
    except OmegaConfBaseException as error:
        raise translate.to_user_error(error, path, []) from error


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML; read back as a recipe file it gives the same Recipe."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe), resolve=True)


def _demand(config: DictConfig, content: dict, overrides: list[str]) -> None:
    # OmegaConf drops a recipe's "key: ???" where the schema has a default, and the run would start without the value
    # that the recipe calls mandatory. Such a key is missing again unless a block or an override gave it a value.
    default = OmegaConf.structured(Recipe)
    named = [translate.override_key(override) for override in overrides]
    for key in _mandatory(content, ""):
        given = any(f"{key}.".startswith(f"{name}.") for name in named)
        if not given and OmegaConf.select(config, key) == OmegaConf.select(default, key):
            OmegaConf.update(config, key, MISSING)


def _mandatory(content: dict, prefix: str) -> Iterator[str]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _mandatory(value, f"{prefix}{name}.")
        elif value == MISSING:
            yield f"{prefix}{name}"


def _read(file: Path, path: str) -> dict:
    # Hydra's own message for a file that is no mapping is about its internals, so such a file is refused here.
    if not re.fullmatch(r"[\w. -]+", file.stem):
        raise UserError(f"{path}: a recipe's file name is made of letters, digits, spaces and . _ -")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise translate.to_user_error(error, path, []) from error
    if not isinstance(content, dict):
        found = "is empty" if content is None else f"holds a {type(content).__name__}"
        raise UserError(
            f"{path}: a recipe is a mapping of keys, this file {found}; 'nemo-bluelm recipes' lists examples"
        )
    if "stages" in content:
        raise UserError(f"{path}: is a pipeline, which only 'nemo-bluelm train' takes; name the recipe of one stage")
    if "hydra" in content:
        raise UserError(f"{path}: hydra: Hydra's own settings have no effect in a recipe; remove the key")
    defaults = content.get("defaults", [])
    if not isinstance(defaults, list) or not all(isinstance(d, str) or _is_block(d) for d in defaults):
        raise UserError(f"{path}: defaults must be a list of blocks such as '- model: tiny', it is {defaults}")
    return content


def _is_block(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and len(entry) == 1
        and all(v is None or isinstance(v, str | list) for v in entry.values())
    )


def _check_overrides(overrides: list[str]) -> None:
    for override in overrides:
        key = override.lstrip("+~").split("=", 1)[0].split("@")[0]
        if key == "hydra.searchpath":  # the one of Hydra's own settings that changes what a recipe means
            continue
        if key.split(".")[0].split("/")[0] == "hydra":
            raise UserError(
                f"{override}: {key} is a setting of Hydra, which has no effect here; only hydra.searchpath has"
            )
        if not key or (not override.startswith("~") and "=" not in override):
            raise UserError(f"{override}: an override is key=value, for example train.steps=100")
