"""Replies from a checkpoint: many prompts with images at once, several samples of each, thoughts within a budget."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from nemo_bluelm.config.schema import ControlToken, geometry_of
from nemo_bluelm.data.chat import encode_prompt
from nemo_bluelm.data.decode import load_tiles
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.generate.decoder import Decoder
from nemo_bluelm.generate.request import Piece, Prompt, Reply, Sampling, TokenPrompt
from nemo_bluelm.generate.sampling import draw, fetch
from nemo_bluelm.generate.writer import Writer
from nemo_bluelm.geometry import Geometry

_WORTH_IT = 0.75  # sequences that have ended are left out once no more than this share goes on


def _none(index: int) -> bool:
    return False


class Generator:
    """A model with its tokenizer and image geometry, for one call at a time. Make one with :func:`open_generator`.

    Args:
        control_token: as ``data.chat.control_token`` of the recipe that the model was trained with.
        decode: backend of ``nemo_bluelm.data.decode``; ``pil`` gives the tiles of an export's image processor.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Tokenizer,
        geometry: Geometry,
        control_token: ControlToken = ControlToken.after_query,
        decode: str = "pil",
    ):
        self.decode = decode
        self.model, self.tokenizer, self.geometry = model, tokenizer, geometry
        self.control_token = control_token

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Reply]:
        """Replies to all prompts, the samples of each one after another.

        Raises:
            UserError: as :meth:`stream`.
        """
        replies: dict[int, Reply] = {p.index: p.reply for p in self.stream(prompts, sampling) if p.reply is not None}
        return [replies[index] for index in range(len(replies))]

    def stream(
        self, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling], dropped: Callable[[int], bool] = _none
    ) -> Iterator[Piece]:
        """The replies' text as it comes; those of a batch take turns. Closing the iterator frees the caches.

        Args:
            sampling: for all prompts, or one for each; those may differ in lengths, budgets, texts and seeds only (see
                :meth:`Sampling.alike`).
            dropped: asked before each further token whether nobody wants the reply of that :attr:`Piece.index` any
                more; then it leaves the batch without a last piece, and the others go on. All ranks of a split model
                must say the same.

        Raises:
            UserError: messages and images that don't go together, an image that can't be decoded, or no room for a
                thought in ``max_new_tokens``.
        """
        yield from self.stream_tokens([self.encode(prompt) for prompt in prompts], sampling, dropped)

    def stream_tokens(
        self,
        prompts: Sequence[TokenPrompt],
        sampling: Sampling | Sequence[Sampling],
        dropped: Callable[[int], bool] = _none,
    ) -> Iterator[Piece]:
        """As :meth:`stream`."""
        if not prompts:
            return
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
        sampling, longest = samplings[0], max(each.max_new_tokens for each in samplings)
        writers = [
            Writer(
                *(prompt.think, own, self.tokenizer, prompt.tokens, place * own.samples + sample),
                (place if prompt.number is None else prompt.number) * own.samples + sample,
            )
            for place, (prompt, own) in enumerate(zip(prompts, samplings, strict=True))
            for sample in range(own.samples)
        ]
        if not longest:
            yield from (Piece(writer.index, "", False, writer.reply()) for writer in writers)
            return
        decoder = Decoder(self.model, self.tokenizer.pad)
        try:
            tokens, tiles = [prompt.tokens for prompt in prompts], [prompt.tiles for prompt in prompts]
            logits = decoder.prefill(tokens, tiles, sampling.samples, longest)
            rows = writers  # the sequences that the decoder has
            for left in reversed(range(longest)):
                # Further rows of the vocabulary only pad the embedding.
                tokens, logprobs = draw(logits[:, : self.tokenizer.vocab_size], sampling, rows)
                drawn = fetch(tokens, logprobs)
                # A GPU goes on while the host looks at what was drawn; should no reply want it, that step was in vain.
                ahead = tokens.is_cuda and left > 0
                if ahead:
                    logits = decoder.step(tokens)
                for writer, token, logprob in zip(rows, *drawn()):
                    if not writer.ended:
                        text, thinking = writer.add(token, logprob)
                        if text or writer.ended:
                            yield Piece(writer.index, text, thinking, writer.reply() if writer.ended else None)
                wanted = [row for row, writer in enumerate(rows) if not writer.ended]
                going = [row for row in wanted if not dropped(rows[row].index)]
                if not going:
                    return
                if len(going) < len(wanted) or len(going) <= _WORTH_IT * len(rows):
                    decoder.keep(going)
                    rows, tokens, logits = [rows[row] for row in going], tokens[going], logits[going]
                if not ahead:
                    logits = decoder.step(tokens)
        finally:
            decoder.close()

    def encode(self, prompt: Prompt) -> TokenPrompt:
        """
        Raises:
            UserError: messages and images that don't go together, or an image that can't be decoded.
        """
        side = self.geometry.tile
        images = enumerate(prompt.images, 1)
        tiles = [load_tiles(data, self.geometry, f"image {number}", self.decode) for number, data in images]
        counts = [len(image) * self.geometry.tokens_per_tile for image in tiles]
        tokens = encode_prompt(prompt.messages, self.tokenizer, counts, bool(prompt.think), self.control_token)
        pixels = torch.cat([torch.empty(0, 3, side, side, dtype=torch.uint8), *tiles])
        return TokenPrompt(tokens, pixels, prompt.think, asked=prompt)


@contextmanager
def open_generator(checkpoint: Path, tensor: int = 1) -> Iterator[Generator]:
    """A generator on the weights of a checkpoint that any layout has written.

    Args:
        tensor: processes that the model is split over, which torchrun has started; they all make the same calls and
            get the same replies.

    Raises:
        UserError: the folder is not a complete checkpoint.
    """
    from nemo_bluelm.runtime.environment import prepare

    prepare()
    from nemo_bluelm.runtime.single import load_model, single_process_world, tensor_parallel_world

    with single_process_world() if tensor == 1 else tensor_parallel_world(tensor):
        model, recipe, tokenizer = load_model(checkpoint)
        yield Generator(model, tokenizer, geometry_of(recipe.model), recipe.data.chat.control_token)
