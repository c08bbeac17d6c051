"""How fast a run learnt, from its ``metrics.jsonl``."""

from itertools import accumulate
from pathlib import Path
from typing import Optional

from nemo_bluelm.runtime.run_dir import read_metrics

SMOOTHING = 10  # steps that a cross-entropy is the mean of


def entropies(run_dir: Path) -> list[float]:
    """Cross-entropy after each step in nats per token, the mean of the last ``SMOOTHING`` steps or of all until then.

    Of a run that distills it is what its loss has of the data, without the teacher's part.
    """
    return _smooth([step.get("cross_entropy", step["loss"]) for step in read_metrics(run_dir)])


def rewards(run_dir: Path) -> list[float]:
    """What the replies of a GRPO run were worth, likewise; empty of a run that has none."""
    return _smooth([step["reward/mean"] for step in read_metrics(run_dir) if "reward/mean" in step])


def _smooth(values: list[float]) -> list[float]:
    windows = (values[max(0, end - SMOOTHING) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def tokens_seen(run_dir: Path) -> list[int]:
    """Tokens of all steps up to each step."""
    return list(accumulate(step["tokens"] for step in read_metrics(run_dir)))


def tokens_to(run_dir: Path, goal: float) -> Optional[int]:
    """Tokens after which the cross-entropy was ``goal`` or less; None if it never was."""
    pairs = zip(tokens_seen(run_dir), entropies(run_dir))
    return next((tokens for tokens, loss in pairs if loss <= goal), None)
