"""Replies by the weights that are being trained, in their place: nothing is copied, and nothing can disagree."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from nemo_bluelm.generate.generator import Generator
from nemo_bluelm.generate.request import Sampling, TokenPrompt
from nemo_bluelm.rl.backends.base import InferenceBackendBase, OnReply


class MCoreBackend(InferenceBackendBase):
    """
    Args:
        generator: on the policy's module, tensor-parallel ranks alike.
        chunks: the policy's DistributedDataParallel modules.
        batch: replies that are written at once.
    """

    def __init__(self, generator: Generator, chunks: Sequence[torch.nn.Module], batch: int):
        self._generator, self._chunks, self._batch = generator, chunks, batch
        self._whole = ExitStack()

    def refit(self) -> None:
        self._whole.enter_context(whole_weights(self._chunks))
        self._generator.model.eval()

    def generate(self, prompts: Sequence[TokenPrompt], sampling: Sampling, on_reply: OnReply) -> None:
        at_once = max(1, self._batch // sampling.samples)
        for start in range(0, len(prompts), at_once):
            for piece in self._generator.stream_tokens(prompts[start : start + at_once], sampling):
                if piece.reply is not None:
                    place, sample = divmod(piece.index, sampling.samples)
                    on_reply(start + place, sample, piece.reply)

    def free(self) -> None:
        self._generator.model.train()
        self._whole.close()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def whole_weights(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Every rank has all its weights as they are now: with overlap the optimizer's ranks exchange them only when the
    next training step asks for them.

    Args:
        chunks: DistributedDataParallel modules.
    """
    hooked = [chunk for chunk in chunks if getattr(chunk, "use_forward_hook", False)]
    for chunk in hooked:
        chunk.disable_forward_pre_hook()
    try:
        yield
    finally:
        for chunk in hooked:
            chunk.enable_forward_pre_hook()
