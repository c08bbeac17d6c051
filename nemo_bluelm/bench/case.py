"""A measurement as a case of its own: its memory is free again afterwards, and its failure stays its own.

A case is a resolved recipe in a file; the command line starts a process of itself on it, which writes the result.
"""

from collections.abc import Callable
from pathlib import Path

from nemo_bluelm.config.compose import to_yaml
from nemo_bluelm.config.schema import Recipe

Start = Callable[[list[str]], int]  # runs `nemo-bluelm ARGUMENTS` and returns its exit code; UserError is the child's

OUT_OF_MEMORY = "out of memory"


def write_case(recipe: Recipe, folder: Path) -> Path:
    """The resolved recipe as a file that the process composes."""
    path = folder / "case.yaml"
    path.write_text(to_yaml(recipe))
    return path
