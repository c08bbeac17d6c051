"""Prompts, images and what the checkpoint answers: with them an engine is compared where this package isn't."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from nemo_bluelm.config.schema import ControlToken
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.generate.decoder import Decoder
from nemo_bluelm.generate.generator import Generator, open_generator
from nemo_bluelm.generate.request import Prompt, TokenPrompt

GOLDEN_FILE = "golden.json"
NEW_TOKENS = 16
_TEXT = "What is 12 of this, in a word?"


def golden(checkpoint: Path, rows: int, whole_tiles: bool = False) -> dict[str, Any]:
    """Content of ``golden.json``: greedy tokens of text, of a thought, of one tile and of many.

    Nothing is ruled out, and a reply goes on behind ``</s>``, so that there is enough to compare.

    ``logprobs`` are of the tokens, ``margins`` by how much each is above the next likeliest: where a margin is smaller
    than an engine's rounding, its token may be the other one.

    Args:
        rows: of the vocabulary, that the export has.
        whole_tiles: images are whole tiles in size, in a square grid; else a margin is left to pad.

    Raises:
        UserError: as :func:`nemo_bluelm.generate.generator.open_generator`.
    """
    with open_generator(checkpoint) as generator:
        tokenizer, side = generator.tokenizer, generator.geometry.tile
        one, grid = (
            (side - 3, side - 9),
            (generator.geometry.max_cols * side - 9, generator.geometry.max_rows * side - 5),
        )
        if whole_tiles:
            one, grid = (side, side), (min(generator.geometry.max_cols, generator.geometry.max_rows) * side,) * 2
        cases = []
        for name, size, think in (
            ("text", None, False),
            ("thought", None, True),
            ("one tile", one, False),
            ("tiles", grid, False),
        ):
            images = [] if size is None else [_png(*size)]
            encoded = ask(generator, images, think)
            cases.append(
                {
                    "name": name,
                    "prompt": _text(len(images), think, generator.control_token),
                    "images": [base64.b64encode(image).decode() for image in images],
                    "prompt_tokens": list(encoded.tokens),
                    "tiles": len(encoded.tiles),
                    **_greedy(generator.model, encoded, tokenizer, rows),
                }
            )
        return {"image_token": tokenizer.image, "cases": cases}


def ask(generator: Generator, images: Sequence[bytes], think: bool) -> TokenPrompt:
    """The prompt of ``golden.json``."""
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": _TEXT}]
    return generator.encode(Prompt([{"role": "user", "content": content}], images, think))


def _greedy(model, prompt: TokenPrompt, tokenizer: Tokenizer, rows: int) -> dict[str, list]:
    decoder = Decoder(model, tokenizer.pad)
    tokens, logprobs, margins = [], [], []
    try:
        logits = decoder.prefill([prompt.tokens], [prompt.tiles], 1, NEW_TOKENS)
        while len(tokens) < NEW_TOKENS:
            if tokens:
                logits = decoder.step(torch.tensor(tokens[-1:], device=logits.device))
            (first, second), (token, _) = (pair.tolist() for pair in logits[0, :rows].log_softmax(-1).topk(2))
            tokens.append(token)
            logprobs.append(first)
            margins.append(first - second)
        return {"tokens": tokens, "logprobs": logprobs, "margins": margins}
    finally:
        decoder.close()


def _text(images: int, think: bool, control_token: ControlToken) -> str:
    """The prompt as the chat template writes it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    from nemo_bluelm.convert.chat_template import chat_template

    content = [*[{"type": "image"}] * images, {"type": "text", "text": _TEXT}]
    (text,), _ = render_jinja_template(
        [[{"role": "user", "content": content}]], chat_template=chat_template(control_token), enable_thinking=think
    )
    return text


def _png(width: int, height: int) -> bytes:
    ramp = Image.linear_gradient("L")
    picture = Image.merge("RGB", [ramp, ramp.transpose(Image.Transpose.ROTATE_90), Image.radial_gradient("L")])
    picture.resize((width, height)).save(content := io.BytesIO(), "PNG")
    return content.getvalue()
