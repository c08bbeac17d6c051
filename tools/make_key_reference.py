"""Write docs/reference/keys.md: every key of recipes and cluster files, from the schema.

    python tools/make_key_reference.py [--check]

``--check`` writes nothing and exits with 1 where the file isn't what it would write.
"""

import argparse
import dataclasses
import enum
import inspect
import re
import sys
import typing
from pathlib import Path

from nemo_bluelm.config.schema import Recipe
from nemo_bluelm.launch.cluster import ClusterConfig

FILE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "keys.md"
HEAD = """# Keys

Made from the schema by `tools/make_key_reference.py`. `nemo-bluelm plan RECIPE` shows what a recipe resolves to. NAME
stands for a name of your own; what is required has no default.

"""


def rows(cls: type, prefix: str = "") -> typing.Iterator[tuple[str, str, str, str]]:
    """Key, type, default and comment of every field, those of nested groups behind it."""
    hints, comments = typing.get_type_hints(cls), comments_of(cls)
    for field in dataclasses.fields(cls):
        key, kind = prefix + field.name, hints[field.name]
        nested = kind
        if typing.get_origin(kind) is dict:
            nested, key_below = typing.get_args(kind)[1], f"{key}.NAME"
        else:
            key_below = key
        if dataclasses.is_dataclass(nested):
            yield from rows(nested, f"{key_below}.")
        else:
            yield key, type_text(kind), default_text(field), comments.get(field.name, "")


def comments_of(cls: type) -> dict[str, str]:
    """What stands behind or above each field in the source."""
    found, above = {}, []
    try:
        source = inspect.getsource(cls)
    except OSError:  # made from the arguments of another class
        return {}
    for line in source.splitlines():
        text = line.strip()
        if text.startswith("#"):
            above.append(text.lstrip("# "))
        elif match := re.match(r"(\w+): [^#]*?(?:#\s*(.*))?$", text):
            found[match[1]] = " ".join([*above, match[2] or ""]).strip()
            above = []
        else:
            above = []
    return found


def type_text(kind: typing.Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Union:
        return " or ".join(type_text(part) for part in arguments if part is not type(None)) + " or null"
    if origin is list:
        return f"list of {type_text(arguments[0])}"
    if origin is dict:
        return f"mapping to {type_text(arguments[1])}"
    if inspect.isclass(kind) and issubclass(kind, enum.Enum):
        return ", ".join(str(member.value) for member in kind)
    return {int: "integer", float: "number", str: "text", bool: "true or false"}.get(
        kind, getattr(kind, "__name__", str(kind))
    )


def default_text(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is dataclasses.MISSING or str(field.default) == "???":
        return ""
    else:
        value = field.default
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def table(title: str, intro: str, cls: type) -> str:
    lines = [f"## {title}", "", intro, "", "| key | is | default | |", "| --- | --- | --- | --- |"]
    for key, kind, default, comment in rows(cls):
        cells = [f"`{key}`", kind, f"`{default}`" if default else "", comment]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def reference() -> str:
    return HEAD + "\n".join(
        (
            table("Recipes", "What `train`, `plan` and `launch` take.", Recipe),
            table("Cluster files", "What `launch --cluster` takes; `conf/cluster/` has some to copy.", ClusterConfig),
        )
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    text = reference()
    if parser.parse_args().check:
        return int(not FILE.is_file() or FILE.read_text() != text)
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
