"""One reply as it grows: what may come next, what must, its thinking budget, and where it ends."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.errors import UserError
from nemo_bluelm.generate.request import Reply, Sampling

_HELD = "\ufffd"  # what the bytes of an unfinished character decode to


class Writer:
    """Takes a reply's tokens one by one.

    Args:
        think: as ``Prompt.think``.
        prompt: its tokens.
        index: of the reply, as :attr:`Piece.index`.
        number: of the reply for its random numbers; None: ``index``.

    Attributes:
        random: this reply's own source of numbers.
        tokens: written so far.
        thinking: whether the next token is of the thought; None before the first.

    Raises:
        UserError: ``max_new_tokens`` leaves no room for a thought and an answer.
    """

    def __init__(
        self,
        think: bool | None,
        sampling: Sampling,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        index: int,
        number: int | None = None,
    ):
        self._tokenizer, self._sampling, self._think = tokenizer, sampling, think
        self._prompt, self.index = prompt, index
        self.random = Random(f"{sampling.seed}/{index if number is None else number}")
        self._closing = [*tokenizer.encode(sampling.closing_text), tokenizer.think_end]
        # <think>, the closing text, </think> and one token of the answer
        room = sampling.max_new_tokens - len(self._closing) - 2
        if think and sampling.enforce and room < 0:
            raise UserError(
                f"max_new_tokens is {sampling.max_new_tokens}; a thought, its end and an answer need "
                f"{sampling.max_new_tokens - room} at least, or ask without thinking"
            )
        self._limit = min(room, room if sampling.think_budget is None else sampling.think_budget)
        self._forced = deque([tokenizer.think] if think and sampling.enforce else [])
        self.tokens: list[int] = []
        self._logprobs: list[float] = []
        self._injected: list[bool] = []
        self.thinking: bool | None = None
        self._thought, self._answer = 0, 0  # tokens that the model wrote
        self._text = _Text(tokenizer)
        self._end: str | None = "length" if sampling.max_new_tokens == 0 else None

    @property
    def ended(self) -> bool:
        return self._end is not None

    @property
    def forced(self) -> int | None:
        """The token that comes next whatever the model says."""
        return self._forced[0] if self._forced else None

    def seen(self) -> list[int]:
        """Tokens of the prompt and the reply."""
        return [*self._prompt, *self.tokens]

    def banned(self) -> list[int]:
        """Tokens that can't come next. The placeholder never can: it would claim an image's visual token."""
        t = self._tokenizer
        early = [t.eos] if len(self.tokens) < self._sampling.min_new_tokens else []
        if not self._sampling.enforce:
            return [t.image, *early]
        banned = [t.pad, t.bos, t.human, t.ai, t.im_start, t.image, t.im_end, t.blue_think]  # the prompt's own
        if self.thinking is None:
            may_think = self._think is None and self._limit >= 0
            return [*banned, t.think_end, *early, *([] if may_think else [t.think])]
        if self.thinking:
            return [*banned, t.think, t.eos]
        after_thought = self._answer == 0 and self.tokens[-1] == t.think_end
        return [*banned, t.think, t.think_end, *([t.eos] if after_thought else early)]

    def add(self, token: int, logprob: float) -> tuple[str, bool]:
        """Take the next token; the text that is now certain, and whether it is of the thought."""
        t, injected = self._tokenizer, bool(self._forced)
        if injected:
            self._forced.popleft()
        self.tokens.append(token)
        self._logprobs.append(logprob)
        self._injected.append(injected)
        text, of_thought = "", bool(self.thinking)
        if self.thinking is None and token == t.think:
            self.thinking = of_thought = True
        elif self.thinking and token == t.think_end:
            text, self.thinking, self._text = self._text.rest(), False, _Text(t)
        elif self.thinking:
            self._thought += not injected
            text = self._text.add(token)
        else:
            self.thinking = False
            text = self._of_answer(token)
        if self.thinking and not self._forced and self._sampling.enforce and self._thought >= self._limit:
            self._forced.extend(self._closing)
        if not self._end and len(self.tokens) == self._sampling.max_new_tokens:
            self._end, text = "length", text + self._text.rest()
        return text, of_thought

    def _of_answer(self, token: int) -> str:
        if token == self._tokenizer.eos:
            self._end = "eos"
            return self._text.rest()
        self._answer += 1
        if not self._sampling.stop:
            return self._text.add(token)
        shown = self._text.shown
        text = self._text.add(token, hold=max(map(len, self._sampling.stop)) - 1)
        found = [at for stop in self._sampling.stop if (at := self._text.whole.find(stop)) >= 0]
        if found:
            self._end, self._text.whole = "stop", self._text.whole[: min(found)]
            text = self._text.whole[shown:]
        return text

    def reply(self) -> Reply:
        """All that was written."""
        parsed = Reply.parse(
            self.tokens,
            self._tokenizer,
            tokens=tuple(self.tokens),
            logprobs=tuple(self._logprobs),
            injected=tuple(self._injected),
            stop_reason=self._end or "length",
            prompt_tokens=len(self._prompt),
            thinking_tokens=self._thought,
            answer_tokens=self._answer,
        )
        return replace(parsed, answer=self._text.whole, finished=True) if self._end == "stop" else parsed


class _Text:
    """Text of tokens as they come, without what a later token may still change.

    Attributes:
        whole: all text but an unfinished character.
        shown: how many of its characters were given out.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._open: list[int] = []  # tokens since the last finished character, after one that sets the context
        self.whole, self.shown = "", 0

    def add(self, token: int, hold: int = 0) -> str:
        """The new text but for its last ``hold`` characters, of which a stop text may be made."""
        self._open.append(token)
        text = self._tokenizer.decode(self._open)
        if not text.endswith(_HELD):
            self.whole += text
            self._open.clear()
        return self._show(hold)

    def rest(self) -> str:
        """What was held back, and the bytes of an unfinished character as they are."""
        self.whole += self._tokenizer.decode(self._open)
        self._open.clear()
        return self._show(0)

    def _show(self, hold: int) -> str:
        end = max(self.shown, len(self.whole) - hold)
        text, self.shown = self.whole[self.shown : end], end
        return text
