"""The next token of each sequence from its logits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_bluelm.generate.request import Sampling
from nemo_bluelm.generate.writer import Writer


def draw(logits: Tensor, sampling: Sampling, writers: Sequence[Writer]) -> tuple[list[int], list[float]]:
    """Next tokens, and their log-probabilities before anything was ruled out.

    Args:
        logits: fp32 [sequences, vocabulary].
        writers: of the sequences.
    """
    scores = logits.clone()
    if sampling.repetition_penalty != 1:
        for row, writer in zip(scores, writers):
            _penalize(row, writer.seen(), sampling.repetition_penalty)
    places = [(row, token) for row, writer in enumerate(writers) for token in writer.banned()]
    scores[_columns(places, scores.device)] = -torch.inf
    if sampling.temperature == 0:
        chosen = scores.argmax(-1)
    else:
        numbers = torch.tensor([writer.random.random() for writer in writers], device=scores.device)
        chosen = _at_random(scores / sampling.temperature, sampling, numbers)
    forced = [(row, writer.forced) for row, writer in enumerate(writers) if writer.forced is not None]
    if forced:
        rows, tokens = _columns(forced, scores.device)
        chosen[rows] = tokens
    if sampling.logprobs_temperature != 1:
        logits = logits / sampling.logprobs_temperature
    logprobs = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(-1)
    return chosen.tolist(), logprobs.tolist()


def _columns(pairs: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(column, device=device) for column in zip(*pairs))


def _penalize(row: Tensor, tokens: Sequence[int], penalty: float) -> None:
    places = torch.tensor(sorted(set(tokens)), device=row.device)
    values = row[places]
    row[places] = torch.where(values > 0, values / penalty, values * penalty)


def _at_random(scores: Tensor, sampling: Sampling, numbers: Tensor) -> Tensor:
    """Tokens at the places ``numbers`` (0 to 1) of the cumulated probabilities, likeliest first."""
    if 0 < sampling.top_k < scores.size(1):
        scores, order = scores.topk(sampling.top_k)  # sorted
    else:
        scores, order = scores.sort(descending=True)
    cumulated = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    # A token stays while those before it have less than top_p together; the first always does.
    kept = cumulated.roll(1, -1) < sampling.top_p
    kept[:, 0] = True
    ends = cumulated.masked_fill(~kept, 0).max(-1, keepdim=True).values
    place = (cumulated <= numbers[:, None] * ends).sum(-1).clamp(max=scores.size(1) - 1)
    return order.gather(1, place[:, None])[:, 0]
