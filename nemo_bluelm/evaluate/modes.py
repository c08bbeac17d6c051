"""How a problem is asked, without thinking or with a thinking budget; prompts in batches by tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Optional

from nemo_bluelm.errors import UserError
from nemo_bluelm.generate.generator import Generator
from nemo_bluelm.generate.request import Prompt, Sampling

_AROUND = 3  # tokens at least around a thought: <think>, </think> and an answer
TOKENS_AT_ONCE = 131_072  # of prompts and replies of a batch, padded to the longest


@dataclass(frozen=True)
class ThinkMode:
    """``budget``: tokens of a thought at most; None: as many as fit."""

    think: bool
    budget: Optional[int] = None

    @property
    def label(self) -> str:
        if not self.think:
            return "no thinking"
        return "thinking" if self.budget is None else f"thinking, {self.budget} at most"

    def sampling(self, sampling: Sampling) -> Sampling:
        """The same, with this budget.

        Raises:
            UserError: the budget leaves no room for an answer.
        """
        if self.budget is not None and self.budget > sampling.max_new_tokens - _AROUND:
            raise UserError(
                f"a thinking budget of {self.budget} leaves no room for an answer in max_new_tokens, which is "
                f"{sampling.max_new_tokens}; raise that, or lower the budget to {sampling.max_new_tokens - _AROUND}"
            )
        return replace(sampling, think_budget=self.budget if self.think else None)


def think_modes(think: bool, direct: bool, budgets: Sequence[Optional[int]] = ()) -> list[ThinkMode]:
    """Without thinking first, then the budgets, least first; ``think`` without a budget is one without a limit."""
    wanted = set(budgets) or ({None} if think else set())
    limits = sorted(wanted, key=lambda budget: float("inf") if budget is None else budget)
    return [ThinkMode(False)] * direct + [ThinkMode(True, budget) for budget in limits]


def prompt_length(generator: Generator, prompt: Prompt) -> int:
    """Tokens of a prompt with its images, all of which are decoded to see that they can be.

    Raises:
        UserError: an image that can't be decoded, messages and images that don't go together.
    """
    return len(generator.encode(prompt).tokens)


def batches(lengths: Sequence[int], new_tokens: int, samples: int, tokens_at_once: int) -> Iterator[list[int]]:
    """Numbers of the prompts that are answered together, the longest first; one that is too long goes alone.

    Args:
        lengths: tokens of each prompt.
        new_tokens: of a reply at most.
        samples: replies to each prompt.
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    at = 0
    while at < len(order):
        each = (lengths[order[at]] + new_tokens) * samples
        size = max(1, tokens_at_once // each)
        yield order[at : at + size]
        at += size
