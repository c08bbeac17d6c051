"""Loss on held-out text, in all and by position in the document."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nemo_bluelm.data.chat import Encoded, encode_document
from nemo_bluelm.data.packs import collate
from nemo_bluelm.generate.generator import Generator


@dataclass(frozen=True)
class Span:
    """Positions ``start`` to ``end`` (not included) of a document; ``loss`` is the mean in nats per token."""

    start: int
    end: int
    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


@torch.inference_mode()
def loss_by_position(generator: Generator, texts: Sequence[str], length: int, spans: int = 8) -> list[Span]:
    """Next-token loss of plain text by position: a model that uses its context gets better along the document.

    The texts are encoded as documents, laid end to end and cut into windows of ``length`` tokens, each of which the
    model sees alone from position 0; what is left over at the end is one shorter window.

    Args:
        texts: held-out texts.
        length: tokens of a window.
        spans: equal parts of the window, rounded up to whole tokens.

    Returns:
        The spans that hold at least one target.

    Raises:
        ValueError: fewer than two tokens in all, or a length or a number of spans that can't be.
    """
    if length < 2 or not 1 <= spans <= length:
        raise ValueError(f"length {length} with {spans} spans; length must be 2 or more and spans from 1 to length")
    tokenizer, device = generator.tokenizer, next(generator.model.parameters()).device
    row = [token for text in texts for token in encode_document(text, tokenizer).tokens]
    total = torch.zeros(length, dtype=torch.float64)
    count = torch.zeros(length, dtype=torch.int64)
    side = generator.geometry.tile
    for at in range(0, len(row), length):
        window = row[at : at + length]
        if len(window) < 2:
            continue
        document = Encoded(window, [True] * len(window))
        tiles = torch.empty(0, 3, side, side, dtype=torch.uint8)
        pack = collate([document], tiles, len(window), alignment=1, pad=tokenizer.pad).to(device)
        losses = generator.model(pack, labels=pack.labels)[0, :-1].double().cpu()  # the last token has no target
        total[: len(losses)] += losses
        count[: len(losses)] += 1
    if not count.sum():
        raise ValueError("the texts hold fewer than two tokens")
    step = -(-length // spans)
    parts = [(start, min(start + step, length)) for start in range(0, length, step)]
    return [
        Span(start, end, float(total[start:end].sum() / count[start:end].sum()), int(count[start:end].sum()))
        for start, end in parts
        if count[start:end].sum()
    ]


def text_loss(generator: Generator, texts: Sequence[str], length: int) -> float:
    """Mean next-token loss of held-out text in nats per token, in windows of ``length`` tokens.

    Raises:
        ValueError: as :func:`loss_by_position`.
    """
    return loss_by_position(generator, texts, length, spans=1)[0].loss
