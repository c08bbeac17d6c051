"""The next token of each sequence from its logits."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nemo_bluelm.generate.request import Sampling
from nemo_bluelm.generate.writer import Writer


def draw(logits: Tensor, sampling: Sampling, writers: Sequence[Writer]) -> tuple[Tensor, Tensor]:
    """Next tokens int64 [sequences], and their log-probabilities fp32 [sequences] before anything was ruled out.

    Nothing here waits for the device.

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
        numbers = _upload([writer.random.random() for writer in writers], scores.device)
        chosen = _at_random(scores / sampling.temperature, sampling, numbers)
    forced = [(row, writer.forced) for row, writer in enumerate(writers) if writer.forced is not None]
    if forced:
        rows, tokens = _columns(forced, scores.device)
        chosen[rows] = tokens
    if sampling.logprobs_temperature != 1:
        logits = logits / sampling.logprobs_temperature
    return chosen, logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(-1)


def fetch(*tensors: Tensor) -> Callable[[], list[list]]:
    """Begin to copy tensors to the host; the result waits for the copies alone, not for what is launched after them."""
    if not tensors[0].is_cuda:
        return lambda: [tensor.tolist() for tensor in tensors]
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    done = torch.cuda.Event()
    done.record()

    def wait() -> list[list]:
        done.synchronize()
        return [copy.tolist() for copy in copies]

    return wait


def _upload(values: Sequence, device: torch.device) -> Tensor:
    tensor = torch.tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _columns(pairs: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    return tuple(_upload(column, device) for column in zip(*pairs))


def _penalize(row: Tensor, tokens: Sequence[int], penalty: float) -> None:
    places = _upload(sorted(set(tokens)), row.device)
    values = row[places]
    row[places] = torch.where(values > 0, values / penalty, values * penalty)


def _at_random(scores: Tensor, sampling: Sampling, numbers: Tensor) -> Tensor:
    """Tokens at the places ``numbers`` (0 to 1) of the cumulated probabilities.

    They are cumulated from the likeliest where some are left out, else by id: sorting would take the longest of all.
    """
    order = None
    if 0 < sampling.top_k < scores.size(1):
        scores, order = scores.topk(sampling.top_k)  # sorted
    elif sampling.top_p < 1:
        scores, order = scores.sort(descending=True)
    cumulated = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    ends = cumulated[:, -1:]
    if sampling.top_p < 1:
        # A token stays while those before it have less than top_p together; the first always does.
        kept = cumulated.roll(1, -1) < sampling.top_p
        kept[:, 0] = True
        ends = cumulated.masked_fill(~kept, 0).max(-1, keepdim=True).values
    place = torch.searchsorted(cumulated, numbers.double()[:, None] * ends, right=True).clamp(max=scores.size(1) - 1)
    return place[:, 0] if order is None else order.gather(1, place)[:, 0]
