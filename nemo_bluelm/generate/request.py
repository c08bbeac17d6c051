"""What is asked of a generator, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from nemo_bluelm.data.chat import Message
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.errors import UserError

_LEAST = 1e-6  # logits that are divided by less may be infinite


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with the user's turn, and the bytes of its image files in order.

    Attributes:
        think: True puts the control token into the prompt, and the reply begins with a thought; False does neither, and
            there is none; None leaves it to the model, without the control token.
    """

    messages: Sequence[Message]
    images: Sequence[bytes] = ()
    think: bool | None = False


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt that is encoded already.

    Attributes:
        tokens: ids, one placeholder for each visual token.
        tiles: uint8 [n, 3, T, T], those of its images in order.
        think: as ``Prompt.think``; the control token is among the tokens.
        number: what its replies depend on beside the seed; None: its place among the prompts of the call.
        asked: what was encoded, for engines that encode it themselves.
    """

    tokens: Sequence[int]
    tiles: Tensor
    think: bool | None = False
    number: int | None = None
    asked: Prompt | None = None


@dataclass(frozen=True)
class Sampling:
    """How replies are written.

    Attributes:
        max_new_tokens: of a reply, those included that the generator itself writes.
        min_new_tokens: before them no reply ends by itself.
        temperature: 0 takes the likeliest token.
        top_p: only the likeliest tokens that together have this probability.
        top_k: only the k likeliest tokens; 0 all.
        repetition_penalty: divides the positive logits, multiplies the negative ones of tokens that the prompt or the
            reply has (arXiv 1909.05858); 1 changes nothing.
        think_budget: tokens of a thought at most; then the generator closes it. None: as many as leave room for an
            answer of one token.
        closing_text: written at the end of a thought that the budget closes, and not counted in it.
        stop: texts that end an answer and are no part of it.
        samples: replies to each prompt.
        seed: a reply depends on it, its prompt and its number, not on what else is in the batch.
        logprobs_temperature: of the distribution that ``Reply.logprobs`` are of.
        enforce: what ``Prompt.think`` says holds whatever the model would do, thoughts are closed, and answers have a
            token at least; False shows what the model does by itself.

    Raises:
        UserError: a value that makes no sense.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    think_budget: int | None = None
    closing_text: str = ""
    stop: tuple[str, ...] = ()
    samples: int = 1
    seed: int = 0
    logprobs_temperature: float = 1.0
    enforce: bool = True

    def alike(self, other: "Sampling") -> bool:
        """Whether replies may be written together: tokens are drawn in one way, and the seed, limits and texts of each
        are its own."""
        own = dict(max_new_tokens=0, min_new_tokens=0, think_budget=None, closing_text="", stop=(), seed=0)
        return replace(self, **own) == replace(other, **own)

    def __post_init__(self):
        budget = self.think_budget
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 0, "0 or more"),
            "min_new_tokens": (0 <= self.min_new_tokens <= self.max_new_tokens, "from 0 to max_new_tokens"),
            "temperature": (
                self.temperature == 0 or _LEAST <= self.temperature < float("inf"),
                f"0, or {_LEAST:g} or more",
            ),
            "top_p": (0 < self.top_p <= 1, "greater than 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "logprobs_temperature": (0 < self.logprobs_temperature < float("inf"), "greater than 0"),
            "repetition_penalty": (
                _LEAST <= self.repetition_penalty <= 1 / _LEAST,
                f"from {_LEAST:g} to {1 / _LEAST:,.0f}",
            ),
            "think_budget": (budget is None or (budget >= 0 and self.enforce), "0 or more, or null, and is enforced"),
            "stop": (all(self.stop), "texts that aren't empty"),
            "samples": (self.samples >= 1, "1 or more"),
        }
        for name, (holds, wanted) in rules.items():
            if not holds:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be {wanted}")


@dataclass(frozen=True)
class Reply:
    """What the model wrote.

    Attributes:
        thought: None without a think block.
        finished: well-formed, and ended by itself or at a stop text.
        tokens: all of them, special ones too.
        logprobs: of each token under the model's own distribution, at temperature 1 or at
            ``Sampling.logprobs_temperature``, and with nothing ruled out.
        injected: the tokens that the generator wrote, not the model: ``<think>``, the closing text, ``</think>``.
        stop_reason: "eos", "stop" or "length".
        thinking_tokens, answer_tokens: that the model wrote; of the answer without ``</s>``.
    """

    thought: str | None
    answer: str
    finished: bool
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    injected: tuple[bool, ...] = ()
    stop_reason: str = "length"
    prompt_tokens: int = 0
    thinking_tokens: int = 0
    answer_tokens: int = 0

    @classmethod
    def parse(cls, written: list[int], tokenizer: Tokenizer, **others) -> "Reply":
        """Split tokens at ``<think>``, ``</think>`` and ``</s>``; an unclosed thought leaves no answer.

        Args:
            others: further fields.
        """
        finished = written[-1:] == [tokenizer.eos]
        body = written[:-1] if finished else written
        if body[:1] != [tokenizer.think]:
            return cls(None, tokenizer.decode(body), finished, **others)
        if tokenizer.think_end not in body:
            return cls(tokenizer.decode(body[1:]), "", False, **others)
        end = body.index(tokenizer.think_end)
        return cls(tokenizer.decode(body[1:end]), tokenizer.decode(body[end + 1 :]), finished, **others)


@dataclass(frozen=True)
class Piece:
    """A part of a stream.

    Attributes:
        index: of the reply: that of its prompt times the samples, plus that of the sample.
        text: what is new.
        thinking: whether it is of the thought.
        reply: all of it, with its last piece.
    """

    index: int
    text: str
    thinking: bool
    reply: Reply | None = None
