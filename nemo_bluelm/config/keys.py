"""Every dotted key of the schema, and the one a misspelt key most likely means."""

import dataclasses
import difflib
import functools
import typing

from nemo_bluelm.config.aliases import ALIASES
from nemo_bluelm.config.schema import Recipe


@functools.cache
def schema_keys() -> tuple[str, ...]:
    """All keys in schema order, groups included; ``NAME`` stands for a free one (``data.sources.NAME.weight``)."""
    return tuple(_walk(Recipe, ""))


def _walk(cls: type, prefix: str) -> typing.Iterator[str]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key, kind = prefix + field.name, hints[field.name]
        yield key
        if typing.get_origin(kind) is dict:
            key, kind = f"{key}.NAME", typing.get_args(kind)[1]
        if dataclasses.is_dataclass(kind):
            yield from _walk(kind, f"{key}.")


def did_you_mean(key: str) -> str:
    """``did you mean optim.lr?`` for a misspelt or misplaced key; what there is at its level if none is near."""
    if key in ALIASES:
        return f"here it is {ALIASES[key]}"
    parts = key.split(".")
    entry = parts[2] if parts[:2] == ["data", "sources"] and len(parts) > 3 else "NAME"
    if entry != "NAME":
        parts[2] = "NAME"
    keys, parent, leaf = schema_keys(), ".".join(parts[:-1]), parts[-1]
    siblings = {k.rsplit(".", 1)[-1]: k for k in keys if k.rpartition(".")[0] == parent}
    leaves = {k.rsplit(".", 1)[-1]: k for k in reversed(keys)}
    close = (
        leaves.get(leaf)  # rightly spelt, in the wrong place
        or _nearest(leaf, siblings)
        or _contained(leaf, siblings)
        or _nearest(".".join(parts), {k: k for k in keys if not key.startswith(f"{k}.")}, 0.8)
        or (None if siblings and parent else _nearest(leaf, leaves))
    )
    if close:
        return f"did you mean {close.replace('.NAME.', f'.{entry}.')}?"
    if not siblings:
        parent, siblings = "", [k for k in keys if "." not in k]
    return f"{parent.replace('NAME', entry) or 'a recipe'} has {', '.join(siblings)}"


def _contained(word: str, choices: dict[str, str]) -> str | None:
    """The longest choice inside the word: ``tensor`` for ``tensor_parallel_size``."""
    inside = [name for name in choices if len(name) > 2 and name in word]
    return choices[max(inside, key=len)] if inside else None


def _nearest(word: str, choices: dict[str, str], cutoff: float = 0.6) -> str | None:
    close = difflib.get_close_matches(word, choices, n=1, cutoff=cutoff)
    return choices[close[0]] if close else None
