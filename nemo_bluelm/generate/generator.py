"""Answers from a checkpoint: greedy decoding of many prompts with images at once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

from nemo_bluelm.config.schema import ControlToken, geometry_of
from nemo_bluelm.data.chat import Encoded, Message, encode_prompt
from nemo_bluelm.data.decode import load_tiles
from nemo_bluelm.data.packs import collate
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.geometry import Geometry


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with the user's turn, and the bytes of its image files in order."""

    messages: Sequence[Message]
    images: Sequence[bytes] = ()
    think: bool = False


@dataclass(frozen=True)
class Reply:
    """What the model wrote. ``thought`` is None without a think block; ``finished``: well-formed, ended by itself."""

    thought: Optional[str]
    answer: str
    finished: bool

    @classmethod
    def parse(cls, tokens: list[int], tokenizer: Tokenizer) -> "Reply":
        """Split new tokens at ``<think>``, ``</think>`` and ``</s>``; an unclosed thought leaves no answer."""
        finished = tokens[-1:] == [tokenizer.eos]
        body = tokens[:-1] if finished else tokens
        if body[:1] != [tokenizer.think]:
            return cls(None, tokenizer.decode(body), finished)
        if tokenizer.think_end not in body:
            return cls(tokenizer.decode(body[1:]), "", False)
        end = body.index(tokenizer.think_end)
        return cls(tokenizer.decode(body[1:end]), tokenizer.decode(body[end + 1 :]), finished)


class Generator:
    """A model with its tokenizer and image geometry. Make one with :func:`open_generator`."""

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Tokenizer,
        geometry: Geometry,
        control_token: ControlToken = ControlToken.after_query,
    ):
        self.model, self.tokenizer, self.geometry = model, tokenizer, geometry
        self.control_token = control_token

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Reply]:
        """Greedy replies; unfinished prompts share one pack, so no prompt pads another.

        Raises:
            UserError: messages and images that don't go together, or an image that can't be decoded.
        """
        if not prompts:
            return []
        sequences, tiles = zip(*(self._encode(prompt) for prompt in prompts))
        written: list[list[int]] = [[] for _ in prompts]
        for _ in range(max_new_tokens):
            open_rows = [i for i, new in enumerate(written) if new[-1:] != [self.tokenizer.eos]]
            if not open_rows:
                break
            logits = self._last_logits([sequences[i] + written[i] for i in open_rows], [tiles[i] for i in open_rows])
            for i, token in zip(open_rows, logits.argmax(-1).tolist()):
                written[i].append(token)
        return [Reply.parse(new, self.tokenizer) for new in written]

    def _encode(self, prompt: Prompt) -> tuple[list[int], Tensor]:
        side = self.geometry.tile
        tiles = [load_tiles(data, self.geometry, f"image {i + 1}") for i, data in enumerate(prompt.images)]
        counts = [len(image) * self.geometry.tokens_per_tile for image in tiles]
        tokens = encode_prompt(prompt.messages, self.tokenizer, counts, prompt.think, self.control_token)
        return tokens, torch.cat([torch.empty(0, 3, side, side, dtype=torch.uint8), *tiles])

    def _last_logits(self, sequences: list[list[int]], tiles: list[Tensor]) -> Tensor:
        """[sequences, vocabulary] logits after the last token of each; the placeholder of visual tokens is ruled out.

        Written by the model, it would claim a visual token of an image further on in the pack.
        """
        documents = [Encoded(tokens, [False] * len(tokens)) for tokens in sequences]
        length = sum(len(tokens) for tokens in sequences)
        pack = collate(documents, torch.cat(tiles), length, alignment=1, pad=self.tokenizer.pad)
        pack = pack.to(next(self.model.parameters()).device)
        logits = self.model(pack)[0, pack.cu_seqlens[1:].long() - 1]
        logits = logits[:, : self.tokenizer.vocab_size]  # rows beyond it only pad the embedding
        logits[:, self.tokenizer.image] = -torch.inf
        return logits


@contextmanager
def open_generator(checkpoint: Path) -> Iterator[Generator]:
    """A generator on a checkpoint's weights, in a world of this process alone.

    Raises:
        UserError: the folder is not a complete checkpoint.
    """
    from nemo_bluelm.runtime.environment import prepare

    prepare()
    from nemo_bluelm.runtime.single import load_model, single_process_world

    with single_process_world():
        model, recipe, tokenizer = load_model(checkpoint)
        yield Generator(model, tokenizer, geometry_of(recipe.model), recipe.data.chat.control_token)
