"""A model's forward passes with cached keys and values: prompts once, then one token a sequence at a time."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_bluelm.data.chat import Encoded
from nemo_bluelm.data.packs import collate
from nemo_bluelm.layers.kv_cache import KVCache, Place

if TYPE_CHECKING:
    from nemo_bluelm.model.bluelm import BlueLMModel

TOKENS_AT_ONCE = 16384  # of the prompts that go through the model together; a longer prompt goes alone
_WIDTHS = 64  # attention looks at a multiple of so many cells


class Decoder:
    """The sequences that are being written; a row of every tensor is a sequence.

    Args:
        model: whole, or one rank's part of it by tensor parallelism; in evaluation mode.
        pad: id of the pad token.
    """

    def __init__(self, model: "BlueLMModel", pad: int):
        self._model, self._pad = model, pad
        self._device = next(model.parameters()).device
        self._attentions = [layer.self_attention.core_attention for layer in model.language.decoder.layers]
        self._lengths: list[int] = []
        self._capacity = 0

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], tiles: Sequence[Tensor], samples: int, room: int) -> Tensor:
        """Read each prompt once, and make a sequence for each of its samples.

        Args:
            prompts: token ids.
            tiles: of each prompt, uint8 [n, 3, T, T].
            room: tokens that will follow at most.

        Returns:
            fp32 [prompts * samples, vocabulary], logits after the last token of each sequence.
        """
        config = self._model.config
        self._lengths = [len(prompt) for prompt in prompts]
        self._capacity = max(self._lengths) + room
        groups = config.num_query_groups // config.tensor_model_parallel_size
        shape = (len(prompts), groups, self._capacity, config.kv_channels)
        for attention in self._attentions:
            attention.cache = KVCache(shape, config.params_dtype, self._device)
        logits = torch.cat([self._read(prompts, tiles, some) for some in _batches(self._lengths)])
        if samples > 1:
            each = [number for number in range(len(prompts)) for _ in range(samples)]
            self.keep(each)
            logits = logits[torch.tensor(each, device=self._device)]
        return logits

    def _read(self, prompts: Sequence[Sequence[int]], tiles: Sequence[Tensor], some: range) -> Tensor:
        from nemo_bluelm.model.bluelm import packed_seq_params

        documents = [Encoded(list(prompts[i]), [False] * len(prompts[i])) for i in some]
        length = sum(self._lengths[i] for i in some)
        pack = collate(documents, torch.cat([tiles[i] for i in some]), length, alignment=1, pad=self._pad)
        pack = pack.to(self._device)
        lengths = pack.cu_seqlens.diff().long()
        place = Place(
            sequences=torch.arange(some.start, some.stop, device=self._device).repeat_interleave(lengths),
            positions=pack.position_ids[0],
        )
        embedded = self._model.embed(pack.tokens, pack.position_ids, pack.tiles)
        hidden = self._pass(place, embedded, pack.position_ids, pack.max_seqlen, packed_seq_params(pack))
        return self._model.language.logits(hidden[pack.cu_seqlens[1:].long() - 1])

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Add a token to each sequence -> fp32 [sequences, vocabulary], logits after it."""
        width = min(self._capacity, -(-(max(self._lengths) + 1) // _WIDTHS) * _WIDTHS)
        inputs = torch.tensor([tokens, self._lengths], device=self._device)
        self._lengths = [length + 1 for length in self._lengths]
        return self._step(*inputs, width)

    def _step(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        """One pass over tensors of the device alone, without a look at their values: what a CUDA graph could replay.

        Args:
            tokens, positions: int64 [sequences], each sequence's new token and its cell.
            width: more than any position.
        """
        place = Place(
            sequences=torch.arange(len(tokens), device=self._device),
            positions=positions,
            mask=(torch.arange(width, device=self._device) <= positions[:, None])[:, None, None],
        )
        embedded = self._model.language.embed(tokens[None], positions[None])
        return self._model.language.logits(self._pass(place, embedded, positions[None], self._capacity))

    def _pass(self, place: Place, embedded: Tensor, position_ids: Tensor, longest: int, pack=None) -> Tensor:
        for attention in self._attentions:
            attention.place = place
        try:
            return self._model.language.hidden_states(embedded, position_ids, longest, pack)
        finally:
            for attention in self._attentions:
                attention.place = None

    @torch.inference_mode()
    def keep(self, sequences: Sequence[int]) -> None:
        """Go on with these sequences, in this order; one may come several times."""
        rows = torch.tensor(sequences, device=self._device)
        for attention in self._attentions:
            attention.cache.select(rows)
        self._lengths = [self._lengths[i] for i in sequences]

    def close(self) -> None:
        """Free the caches."""
        for attention in self._attentions:
            attention.cache = None


def _batches(lengths: Sequence[int]) -> Iterator[range]:
    """Neighbours that go through the model together."""
    start = total = 0
    for i, length in enumerate(lengths):
        if i > start and total + length > TOKENS_AT_ONCE:
            yield range(start, i)
            start, total = i, 0
        total += length
    yield range(start, len(lengths))
