"""Accuracy by thinking budget: what a model's thoughts are worth, and what they cost."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Optional

from nemo_bluelm.data.records import Record
from nemo_bluelm.evaluate.modes import TOKENS_AT_ONCE, ThinkMode, batches, prompt_length, think_modes
from nemo_bluelm.evaluate.scorers.base import Score
from nemo_bluelm.evaluate.scorers.text import Exact
from nemo_bluelm.generate.generator import Generator
from nemo_bluelm.generate.request import Prompt, Reply, Sampling

_Z = 1.959964  # 95 %


@dataclass(frozen=True)
class Result:
    """One reply and its score; ``key`` is the problem's, several samples share it."""

    key: str
    think: bool
    budget: Optional[int]
    sample: int
    score: Optional[float]
    reason: str
    passing: bool
    thought: Optional[str]
    answer: str
    thinking_tokens: int
    answer_tokens: int
    prompt_tokens: int
    finished: bool

    @classmethod
    def of(cls, key: str, mode: ThinkMode, sample: int, reply: Reply, score: Score) -> "Result":
        return cls(
            key,
            mode.think,
            mode.budget,
            sample,
            score.value,
            score.reason,
            score.passing,
            reply.thought,
            reply.answer,
            reply.thinking_tokens,
            reply.answer_tokens,
            reply.prompt_tokens,
            reply.finished,
        )


@dataclass(frozen=True)
class Row:
    """All results in one mode.

    Attributes:
        accuracy: mean score of the problems, each the mean of its samples; None where nothing is scored.
        low, high: Wilson's 95 % interval of it, by the number of problems.
        thinking_tokens, answer_tokens: means of a reply.
        most_thinking_tokens: of any reply.
        finished: share of the replies that ended by themselves.
        problems: scored ones.
        unscored: replies without a score.
    """

    think: bool
    budget: Optional[int]
    accuracy: Optional[float]
    low: Optional[float]
    high: Optional[float]
    thinking_tokens: float
    most_thinking_tokens: int
    answer_tokens: float
    finished: float
    problems: int
    unscored: int

    @property
    def mode(self) -> ThinkMode:
        return ThinkMode(self.think, self.budget)


def accuracy_by_budget(
    generator: Generator,
    problems: Sequence[tuple[Record, Sequence[bytes]]],
    budgets: Sequence[Optional[int]],
    max_new_tokens: int = 128,
    tokens_at_once: int = TOKENS_AT_ONCE,
) -> list[Row]:
    """Every problem without thinking and with each budget, greedy.

    Args:
        problems: conversations that end with the expected answer, and the bytes of their images.
        budgets: tokens of a thought at most; None for as many as fit.
        max_new_tokens: of a reply, thought and answer together.

    Returns:
        A row without thinking, then one for each budget, least first.

    Raises:
        UserError: messages and images that don't go together, an image that can't be decoded, a budget without room
            for an answer.
        ValueError: no problem.
    """
    if not problems:
        raise ValueError("there is no problem")
    scorer, rows = Exact(), []
    lengths = [prompt_length(generator, Prompt(record.messages[:-1], images, True)) for record, images in problems]
    for mode in think_modes(think=True, direct=True, budgets=budgets):
        sampling = mode.sampling(Sampling(max_new_tokens=max_new_tokens))
        results = []
        for some in batches(lengths, max_new_tokens, 1, tokens_at_once):
            prompts = [Prompt(problems[i][0].messages[:-1], problems[i][1], mode.think) for i in some]
            for i, reply in zip(some, generator.generate(prompts, sampling)):
                score = scorer.score(reply.answer, {"answer": expected(problems[i][0])})
                results.append(Result.of(str(i), mode, 0, reply, score))
        rows.append(summarize(mode, results))
    return rows


def as_rows(rows: Iterable[Row]) -> list[dict]:
    """The result as plain values, for a report."""
    return [asdict(row) for row in rows]


def expected(record: Record) -> str:
    """Text of the last message of a conversation."""
    content = record.messages[-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def summarize(mode: ThinkMode, results: Sequence[Result]) -> Row:
    """The row of one mode; of no result it is one of zeros, without an accuracy."""
    scored = sorted((result for result in results if result.score is not None), key=lambda result: result.key)
    means = []
    for _, samples in groupby(scored, key=lambda result: result.key):
        scores = [result.score for result in samples]
        means.append(sum(scores) / len(scores))
    accuracy = sum(means) / len(means) if means else None
    low, high = (None, None) if accuracy is None else wilson(accuracy, len(means))
    count = max(1, len(results))
    return Row(
        mode.think,
        mode.budget,
        accuracy,
        low,
        high,
        thinking_tokens=sum(result.thinking_tokens for result in results) / count,
        most_thinking_tokens=max((result.thinking_tokens for result in results), default=0),
        answer_tokens=sum(result.answer_tokens for result in results) / count,
        finished=sum(result.finished for result in results) / count,
        problems=len(means),
        unscored=len(results) - len(scored),
    )


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of ``count`` trials.

    Scores between 0 and 1 vary less than trials of the same mean, so for them it is too wide, never too narrow.
    """
    middle = share + _Z**2 / (2 * count)
    spread = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    scale = 1 + _Z**2 / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
