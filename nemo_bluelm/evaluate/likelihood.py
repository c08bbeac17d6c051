"""How likely a model finds given continuations, and whether it would write them itself."""

from collections.abc import Sequence

import torch

from nemo_bluelm.data.chat import Encoded
from nemo_bluelm.data.packs import collate
from nemo_bluelm.generate.generator import Generator

_TOKENS_AT_ONCE = 8192  # logits of so many tokens are in memory at a time, or of one longer document


@torch.inference_mode()
def loglikelihoods(
    generator: Generator, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[tuple[float, bool]]:
    """Of each continuation: its tokens' log-probabilities in nats, added up, and whether each is the likeliest.

    Args:
        pairs: tokens of the context, at least one, and of the continuation.
    """
    order = sorted(range(len(pairs)), key=lambda number: -sum(map(len, pairs[number])))
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    while order:
        some, total = [], 0
        while order and (not some or total + sum(map(len, pairs[order[0]])) <= _TOKENS_AT_ONCE):
            total += sum(map(len, pairs[order[0]]))
            some.append(order.pop(0))
        for number, result in zip(some, _one_pack(generator, [pairs[number] for number in some])):
            found[number] = result
    return found


def _one_pack(generator: Generator, pairs: list[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
    documents = [Encoded([*context, *target], [False] * (len(context) + len(target))) for context, target in pairs]
    side, device = generator.geometry.tile, next(generator.model.parameters()).device
    tiles = torch.empty(0, 3, side, side, dtype=torch.uint8)
    length = sum(len(document.tokens) for document in documents)
    pack = collate(documents, tiles, length, alignment=1, pad=generator.tokenizer.pad).to(device)
    # Rows beyond the vocabulary only pad the embedding.
    logits = generator.model(pack)[0, :, : generator.tokenizer.vocab_size]
    found = []
    for end, (_, target) in zip(pack.cu_seqlens[1:].tolist(), pairs):
        rows = logits[end - 1 - len(target) : end - 1].double()
        wanted = torch.tensor(list(target), dtype=torch.long, device=device)
        logs = rows.log_softmax(-1).gather(1, wanted[:, None])
        found.append((float(logs.sum()), bool((rows.argmax(-1) == wanted).all())))
    return found
