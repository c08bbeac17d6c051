"""Prompts of all kinds: text, one image, several, turns, thinking."""

import io

import numpy as np
from PIL import Image

from nemo_bluelm.generate.request import Prompt

VOCABULARY = 320  # of the models; the tokenizer has fewer


def picture(width, height, seed):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def ask(text, *images, think=False):
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
    return Prompt([{"role": "user", "content": content}], images, think)


PROMPTS = [
    ask("seven?"),
    ask("describe the picture", picture(56, 56, 1)),
    ask("what is seven of nine? and what is nine of seven?", think=True),
    ask("both?", picture(120, 40, 2), picture(30, 30, 3)),
    Prompt(
        [
            {"role": "user", "content": [{"type": "text", "text": "look"}, {"type": "image"}]},
            {"role": "assistant", "content": "seven", "thinking": "of"},
            {"role": "user", "content": "nine?"},
        ],
        [picture(50, 100, 4)],
    ),
]
