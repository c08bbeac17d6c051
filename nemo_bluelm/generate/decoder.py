"""A model's forward passes with cached keys and values: prompts once, then one token a sequence at a time."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_bluelm.data.chat import Encoded
from nemo_bluelm.data.packs import collate
from nemo_bluelm.generate.graph import StepGraph
from nemo_bluelm.layers.kv_cache import KVCache, Place

if TYPE_CHECKING:
    from nemo_bluelm.model.bluelm import BlueLMModel

TOKENS_AT_ONCE = 16384  # of the prompts that go through the model together; a longer prompt goes alone
_WIDTHS = 128  # attention looks at a multiple of so many cells; each width is recorded once on a GPU


class Decoder:
    """The sequences that are being written; a row of every tensor is a sequence.

    On a GPU the steps of one process are recorded as CUDA graphs: launched one by one, a step's kernels would take the
    host longer than the GPU.

    Args:
        model: whole, or one rank's part of it by tensor parallelism; in evaluation mode.
        pad: id of the pad token.
    """

    def __init__(self, model: "BlueLMModel", pad: int):
        self._model, self._pad = model, pad
        self._device = next(model.parameters()).device
        self._attentions = [layer.self_attention.core_attention for layer in model.language.decoder.layers]
        self._lengths: list[int] = []
        self._positions: Tensor | None = None  # the same, on the device
        self._capacity = 0
        self._records = self._device.type == "cuda" and model.config.tensor_model_parallel_size == 1
        self._warm = False  # the kernels of a step have run
        self._graph: StepGraph | None = None

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
        self._positions = torch.tensor(self._lengths, device=self._device)
        self._capacity = -(-(max(self._lengths) + room) // _WIDTHS) * _WIDTHS
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
    def step(self, tokens: Tensor) -> Tensor:
        """Add a token to each sequence -> fp32 [sequences, vocabulary], logits after it.

        The next step may overwrite them.

        Args:
            tokens: int64 [sequences], on the model's device.
        """
        width = -(-(max(self._lengths) + 1) // _WIDTHS) * _WIDTHS
        if self._graph is not None and self._graph.width != width:
            self._graph = None  # frees its memory before the next one takes its own
        if self._records and self._warm and self._graph is None:
            self._graph = StepGraph(self._step, len(tokens), width, self._device)
        logits = self._graph(tokens, self._positions) if self._graph else self._step(tokens, self._positions, width)
        self._warm = True
        self._positions += 1
        self._lengths = [length + 1 for length in self._lengths]
        return logits

    def _step(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        """One pass over tensors of the device alone, without a look at their values: what a CUDA graph can replay.

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
        self._graph = None  # it reads the caches of before
        for attention in self._attentions:
            attention.cache.select(rows)
        self._positions = self._positions[rows]
        self._lengths = [self._lengths[i] for i in sequences]

    def close(self) -> None:
        """Free the caches."""
        self._graph = None
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
