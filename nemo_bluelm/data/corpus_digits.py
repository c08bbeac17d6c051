"""Corpus part: scikit-learn's handwritten digits as questions about 8 x 8 pixel images."""

import io
from typing import Any

import numpy as np
from PIL import Image
from skimage.measure import label
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from nemo_bluelm.data.writer import RawSample, question_record

QUESTIONS = (
    "What digit is this?",
    "Which digit is shown?",
    "Read the digit.",
    "What number is written here?",
    "Name this digit.",
)
_LOOPS = ("no loop", "one loop", "two loops", "three loops")
_QUARTERS = ("top left", "top right", "bottom left", "bottom right")


def samples(seed: int) -> tuple[list[RawSample], list[RawSample]]:
    """(train, test): 80 % of each class twice, with and without a thought; 20 % once, without."""
    digits, members = split_digits(seed)
    rng = np.random.default_rng([seed, 1])
    made: dict[str, list[RawSample]] = {"train": [], "test": []}
    for split, numbers in members.items():
        for number in numbers.tolist():
            pixels, digit = digits.images[number], int(digits.target[number])
            for thinking in (False, True) if split == "train" else (False,):
                question = QUESTIONS[rng.integers(len(QUESTIONS))]
                thought = describe(pixels) + f" So the digit is {digit}." if thinking else None
                mode = "think" if thinking else "direct"
                record = question_record(question, str(digit), thought, "0.png", ["digits", split, mode])
                made[split].append(RawSample(f"digit-{number:04d}-{mode}", record, {"0.png": _png(pixels)}))
    return made["train"], made["test"]


def split_digits(seed: int) -> tuple[Any, dict[str, np.ndarray]]:
    """scikit-learn's digits and, by split, the numbers of those in it: 20 % of each class are ``test``."""
    digits = load_digits()
    everything = np.arange(len(digits.target))
    train, test = train_test_split(everything, test_size=0.2, stratify=digits.target, random_state=seed)
    return digits, {"train": train, "test": test}


def describe(pixels: np.ndarray) -> str:
    """What can be measured: closed loops, and the quarters with the most and the least ink.

    Args:
        pixels: [8, 8] ink from 0 to 16. A pixel counts as ink from half of that; ink touches diagonally, background
            doesn't, and a loop is background that doesn't reach the border.
    """
    paper = np.pad(pixels < 8, 1, constant_values=True)
    loops = int(label(paper, connectivity=1).max()) - 1
    quarters = [pixels[:4, :4].sum(), pixels[:4, 4:].sum(), pixels[4:, :4].sum(), pixels[4:, 4:].sum()]
    most, least = _QUARTERS[int(np.argmax(quarters))], _QUARTERS[int(np.argmin(quarters))]
    return f"I see {_LOOPS[loops]}, most ink {most}, least ink {least}."


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
