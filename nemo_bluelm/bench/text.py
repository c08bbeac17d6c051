"""English text that every machine with this package has: language reference, dataset descriptions, docstrings."""

import ast
import sysconfig
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from nemo_bluelm.errors import UserError

_PACKAGES = ("numpy", "scipy", "sklearn", "torch", "transformers")
_SHORTEST = 80  # characters; shorter docstrings say little


def long_text(size: int) -> str:
    """At least ``size`` characters of text, the same on every machine with the same packages.

    Raises:
        UserError: the installed packages have less.
    """
    parts, total = [], 0
    for text in _texts():
        parts.append(text)
        total += len(text) + 2
        if total >= size:
            return "\n\n".join(parts)
    raise UserError(
        f"the installed packages hold {total:,} characters of text, {size:,} are wanted; ask for fewer tokens, or "
        f"install one of {', '.join(_PACKAGES)}"
    )


def _texts() -> Iterator[str]:
    from nemo_bluelm.data import corpus_text

    for sample in chain(*corpus_text.samples()):
        yield sample.record["text"].strip()
    for file in _files():
        try:
            tree = ast.parse(file.read_bytes())
        except SyntaxError:  # files made to fail, in the packages' own tests
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = (ast.get_docstring(node) or "").strip()
                if len(text) >= _SHORTEST:
                    yield text


def _files() -> Iterator[Path]:
    """Python files by name: the standard library's own, then the packages'."""
    yield from sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    site = Path(sysconfig.get_path("purelib"))
    for package in _PACKAGES:
        yield from sorted((site / package).rglob("*.py"))
