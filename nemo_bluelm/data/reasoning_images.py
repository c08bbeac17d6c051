"""Synthetic reasoning problems about images: handwritten digits pasted into a grid, thought and answer computed."""

import io
from collections.abc import Callable
from random import Random

import numpy as np
from PIL import Image

from nemo_bluelm.data.corpus_digits import split_digits
from nemo_bluelm.data.reasoning import Problem
from nemo_bluelm.errors import UserError

SIDES = (1, 2, 3)  # rows and columns of a grid
_LARGER = 4


def image_problems(seed: int, split: str, rows: int | None = None) -> Callable[[Random], Problem]:
    """Makes problems of scikit-learn's digits, ``train`` or ``test`` as the corpus splits them.

    Args:
        seed: of the split.
        rows: side of the grid; None draws rows and columns from :data:`SIDES`.

    Raises:
        UserError: an unknown split.
    """
    if split not in ("train", "test"):
        raise UserError(f"split is {split!r}; it must be train or test")
    digits, members = split_digits(seed)
    pool = [int(number) for number in members[split]]

    def make(rng: Random) -> Problem:
        shape = [rows or rng.choice(SIDES) for _ in range(2)]
        chosen = [rng.choice(pool) for _ in range(shape[0] * shape[1])]
        grid = np.array([int(digits.target[n]) for n in chosen]).reshape(shape)
        pixels = np.block([[digits.images[n] for n in line] for line in np.array(chosen).reshape(shape)])
        question, steps, answer = rng.choice(_QUESTIONS)(grid)
        seen = " ".join(f"Row {i + 1}: {_spaced(row)}." for i, row in enumerate(grid))
        return Problem("image", question, f"{seen} {steps}".strip(), answer, _png(pixels))

    return make


def _sum(grid: np.ndarray) -> tuple[str, str, str]:
    total = int(grid.sum())
    return "What is the sum of the digits?", f"{' + '.join(map(str, grid.ravel()))} = {total}.", str(total)


def _largest(grid: np.ndarray) -> tuple[str, str, str]:
    return "Which digit is the largest?", f"The largest is {grid.max()}.", str(grid.max())


def _count(grid: np.ndarray) -> tuple[str, str, str]:
    above = [str(d) for d in grid.ravel() if d > _LARGER]
    found = " ".join(above) or "none"
    return f"How many digits are larger than {_LARGER}?", f"Larger than {_LARGER}: {found}.", str(len(above))


def _read(grid: np.ndarray) -> tuple[str, str, str]:
    return "Read the digits row by row.", "", _spaced(grid.ravel())


_QUESTIONS = (_sum, _largest, _count, _read)


def _spaced(digits: np.ndarray) -> str:
    return " ".join(map(str, digits))


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
