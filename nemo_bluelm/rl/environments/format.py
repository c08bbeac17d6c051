"""Whether a reply has the form that was asked for."""

import re
from dataclasses import dataclass
from typing import Optional

from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate.scorers.base import Score
from nemo_bluelm.rl.environments.base import Episode, RewardFunction
from nemo_bluelm.rl.environments.registry import register_reward

_MARKS = ("<think>", "</think>", "[|BlueThink|]")


@register_reward("format")
@dataclass
class Format(RewardFunction):
    r"""1 if there is a thought where one was asked for, none where none was, and an answer after it.

    Neither holds marks of thoughts. Where it was left to the model, both forms are right.

    Attributes:
        pattern: regular expression that the answer must have somewhere, such as ``\\boxed\{``.
        max_answer: characters of an answer at most; None: any.
    """

    pattern: Optional[str] = None
    max_answer: Optional[int] = None

    def check(self) -> None:
        if self.max_answer is not None and self.max_answer < 1:
            raise UserError(f"max_answer is {self.max_answer}; it must be 1 or more")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise UserError(f"pattern {self.pattern!r} is no regular expression: {error}") from error

    def score(self, episode: Episode) -> Score:
        wrong = self._wrong(episode)
        return Score(float(not wrong), wrong)

    def _wrong(self, episode: Episode) -> str:
        thought, answer = episode.reply.thought, episode.reply.answer
        if thought is None and episode.think is True:
            return "no thought"
        if thought is not None and episode.think is False:
            return "a thought that wasn't asked for"
        if thought is not None and not thought.strip():
            return "an empty thought"
        if any(mark in text for text in (thought or "", answer) for mark in _MARKS):
            return "a mark of a thought inside the thought or the answer"
        if not answer.strip():
            return "no answer"
        if not episode.reply.finished:
            return "the answer has no end"
        if self.max_answer is not None and len(answer) > self.max_answer:
            return f"the answer has more than {self.max_answer} characters"
        if self.pattern is not None and not re.search(self.pattern, answer):
            return f"nothing in the answer is as {self.pattern}"
        return ""
