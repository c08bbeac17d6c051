"""Every error of Hydra, OmegaConf and YAML as one line that names the key or file, what was found and the way out."""

import difflib
import re
from pathlib import Path

import yaml
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from nemo_bluelm.config.keys import did_you_mean, schema_keys
from nemo_bluelm.errors import UserError

_WANTED = {
    "Integer": "a whole number",
    "int": "a whole number",
    "Float": "a number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
}
_KINDS = {"int": "a number", "float": "a number", "bool": "true or false", "str": "a text", "list": "a list"}
_SOURCES = "data.sources"


def to_user_error(error: Exception, path: str, overrides: list[str]) -> UserError:
    """The UserError that says what ``error`` means to the author of a recipe.

    Args:
        error: what reading, composing or converting the recipe raised.
        path: the recipe as the user named it.
        overrides: the overrides it was composed with.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, yaml.YAMLError):
        return UserError(_yaml(error, path))
    if isinstance(error, MissingConfigException):
        return UserError(_missing_block(error, path, overrides))
    if isinstance(error, OverrideParseException):
        return UserError(_syntax(error.override))
    if isinstance(error, UnicodeDecodeError):
        return UserError(f"{path}: not a text file in UTF-8, or one of its blocks is not")
    if isinstance(error, OSError):
        return UserError(f"{error.filename or path}: cannot be read: {error.strerror or error}")
    if isinstance(error, RecursionError):
        return UserError(f"{path}: the defaults list includes itself, directly or through a block")
    return UserError(_composition(error, path, overrides))


def _yaml(error: yaml.YAMLError, path: str) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:
        return f"{path}: not valid YAML: {error}"
    name = path if mark.name.startswith("<") else _near(mark.name)
    return f"{name}: line {mark.line + 1}: not valid YAML: {error.problem or error.context}"


def _near(path: str) -> str:
    """The path from the working folder where it lies below it."""
    file, here = Path(path), Path.cwd()
    return str(file.relative_to(here)) if file.is_relative_to(here) else path


def _missing_block(error: MissingConfigException, path: str, overrides: list[str]) -> str:
    wanted = (error.missing_cfg_file or "").removesuffix(".yaml")
    group, _, option = wanted.rpartition("/")
    by_override = next((o for o in overrides if override_key(o) == group), None)
    where = by_override or f"{path}: {f'{group}: {option}' if group else wanted}"
    options = list(error.options or [])
    if not options:
        groups = [key for key in schema_keys() if "." not in key]
        close = difflib.get_close_matches(group or wanted, groups, n=1)
        return f"{where}: no such block; " + (
            f"did you mean {close[0]}?" if close else "look for a misspelt name in defaults"
        )
    close = difflib.get_close_matches(option, options, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{where}: {group} has no option {option or '(empty)'}; {hint}options: {', '.join(options)}"


def _syntax(override: str) -> str:
    key, _, value = override.partition("=")
    if value.strip("'\"") == value and re.fullmatch(r"[\w./@+~-]+", key) and not re.search(r"[\[\]{}']", value):
        return f"{override}: not a valid override; quote a value with special characters: {key}=\"'{value}'\""
    return f"{override}: not a valid override; it is key=value, a list is key=[a,b], a mapping key={{a: 1}}"


def _composition(error: Exception, path: str, overrides: list[str]) -> str:
    cause = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    outer, text = str(error), str(cause or error)
    where, override = path, None
    if block := re.match(r"In '(.+?)': \w+ raised while composing", outer):
        where = path if block[1] == Path(path).stem else f"block {block[1]}"
        text = outer.partition("\n")[2]
    elif named := re.match(r"Error merging override (.*)|Could not override '(.+?)'", outer):
        override = named[1] or next((o for o in overrides if override_key(o) == named[2]), named[2])
        where = override
    key = found[1] if (found := re.search(r"full_key: (\S+)", text)) else ""
    if where == path:
        quoted = re.search(r"'(.+?)'(?: requires --multirun)?$", text.split("\n", 1)[0])
        named = next((o for o in overrides if override_key(o) == key or (quoted and o == quoted[1])), None)
        where, override = named or path, named
    first = text.split("\n", 1)[0].strip() or type(cause or error).__name__
    return f"{where}: {_meaning(first, key, override)}"


def override_key(override: str) -> str:
    """``optim.lr`` of ``+optim.lr=1``."""
    return override.lstrip("+~").split("=", 1)[0]


def _meaning(first: str, key: str, override: str | None) -> str:
    for pattern, meaning in _MEANINGS:
        if match := re.search(pattern, first):
            return meaning(match, key, override)
    return f"{key}: {first}" if key and key not in first else first


def _unknown_key(match, key, override):
    if key.startswith(f"{_SOURCES}.") and key.count(".") == 2:
        return _new_source(match, key, override)
    return f"unknown key {key or match[1]}; {did_you_mean(key or match[1])}"


def _new_source(match, key, override):
    name = key.rsplit(".", 1)[-1] or "NAME"
    if override and override_key(override).startswith(f"{_SOURCES}."):
        name = override_key(override).split(".")[2]
    return f"{_SOURCES} has no source {name}; add one with '+{_SOURCES}={{{name}: {{shards: [{name}-*.tar]}}}}'"


def _wrong_value(match, key, override):
    return f"{key} is {match[1]!r}; it must be {_WANTED.get(match[2], match[2])}"


def _null(match, key, override):
    return f"{key} is null; it must be {_WANTED.get(match[1], match[1])}"


def _not_list(match, key, override):
    value = (override or "").partition("=")[2] or "a"
    return f"{key} is no list; write {key}=[{value}]"


def _not_mapping(match, key, override):
    # OmegaConf leaves the key out here; the type names it, for each group of the schema has its own.
    group = key or _group_of(match[2]) or match[2]
    keys = [
        k.removeprefix(f"{group}.")
        for k in schema_keys()
        if k.startswith(f"{group}.") and k.count(".") == group.count(".") + 1
    ]
    return f"{group} is {_KINDS.get(match[1], match[1])}; it must be a mapping" + (
        f" of {', '.join(keys)}" if keys else ""
    )


def _group_of(type_name: str) -> str:
    if type_name.startswith("Dict["):
        return _SOURCES
    if type_name == "SourceConfig":
        return f"{_SOURCES}.NAME"
    word = type_name.removesuffix("Config").lower()
    return next((key for key in schema_keys() if key.rsplit(".", 1)[-1] == word), "")


def _mandatory(match, key, override):
    return f"{key} is mandatory, it can be changed but not removed"


# OmegaConf's first line -> what it means; the first match counts.
_MEANINGS = [
    (r"^Key '(.*?)' (?:is )?not in ", _unknown_key),
    (r"^Invalid type assigned: dict is not a subclass of SourceConfig", _new_source),
    (r"^Invalid value '(.*)', expected one of \[(.*)\]", lambda m, k, o: f"{k} is {m[1]!r}; allowed: {m[2]}"),
    (r"Value '(.*)' of type '\w+' could not be converted to (\w+)", _wrong_value),
    (r"^Value '(.*)' is not a valid (bool)", _wrong_value),
    (r"^Value '(.*)' \(\w+\) is incompatible with type hint '(\w+)'", _wrong_value),
    (r"^Incompatible value 'None' for field of type '(\w+)'", _null),
    (r"^field '(.*)' is not Optional", lambda m, k, o: f"{k} is null; it must have a value"),
    (r"is not a ListConfig, list or tuple", _not_list),
    (r"(?:Merge error|Invalid type assigned): (\w+) is not a subclass of (.+?)\. value", _not_mapping),
    (r"^Invalid value assigned: (\w+) is not a (\w+), subclass or dict", _not_mapping),
    (r"^Cannot merge DictConfig with (ListConfig)", lambda m, k, o: f"{k or _SOURCES} is a list; it must be a mapping"),
    (r"does not support deletion", _mandatory),
    (
        r"^Could not delete from config\. '(.*)' does not exist",
        lambda m, k, o: f"no key {m[1]} to delete; {did_you_mean(m[1])}",
    ),
    (
        r"^Interpolation key '(.*)' not found",
        lambda m, k, o: f"{k} refers to ${{{m[1]}}}, which does not exist; {did_you_mean(m[1])}",
    ),
    (
        r"Environment variable '(.*)' not found",
        lambda m, k, o: f"{k} needs the environment variable {m[1]}, which is not set",
    ),
    (r"^Recursive interpolation", lambda m, k, o: f"{k} refers to itself through ${{...}}"),
    (
        r"^Unsupported interpolation type (\S+)",
        lambda m, k, o: f"{k} uses ${{{m[1]}:...}}; known are oc.env and plain keys",
    ),
    (
        r"^no viable alternative|^token recognition error|^extraneous input|^mismatched input|^missing ",
        lambda m, k, o: f"{k} holds a malformed ${{...}} reference",
    ),
    (
        r"^Ambiguous value for argument|^Sweep parameters",
        lambda m, k, o: "several values for one key; a list is key=[a,b], a text with a comma is key=\"'a,b'\"",
    ),
    (r"^Config group override must be", lambda m, k, o: "a block is chosen by its name, for example model=tiny"),
    (r"^You must specify '(.*?)'", lambda m, k, o: f"the block {m[1]} is mandatory; choose one as {m[1]}=NAME"),
    (r"^(\S+) appears more than once", lambda m, k, o: f"the block {m[1]} is listed twice; change it with {m[1]}=NAME"),
    (r"^Could not override '(.+)@", lambda m, k, o: f"a block has one place in a recipe; choose it as {m[1]}=NAME"),
    (r"^In .*?: Override '(\S+)", lambda m, k, o: f"defaults: {m[1]}: entries with 'override' stand last"),
    (r"^Duplicate _self_", lambda m, k, o: "defaults: _self_ is listed twice"),
    (
        r"looks like a config group override, but config group '(.*)' does not exist",
        lambda m, k, o: f"there is no block {m[1]}; {did_you_mean(m[1])}",
    ),
]
