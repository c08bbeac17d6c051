"""How often a trained reward model prefers the answers that it should."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from nemo_bluelm.config.schema import DataConfig, SourceConfig
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.environment import prepare, quiet


def score_pairs(checkpoint: Path, shard: str, limit: int = 1000) -> dict[str, float]:
    """
    Args:
        checkpoint: as :func:`nemo_bluelm.rl.reward_job.resolve_reward_model` gives it.
        shard: JSONL file or tar of pairs.
        limit: pairs at most, the first ones.

    Returns:
        ``pairs``, ``accuracy`` (ties count half) and ``margin``, by how much chosen answers score higher on average.

    Raises:
        UserError: no pairs, or pairs longer than the packs of its training.
    """
    prepare()
    from nemo_bluelm.rl.preferences import PreferenceDataset
    from nemo_bluelm.rl.reward_model import open_reward_model

    path = Path(shard).absolute()
    data = DataConfig(root=str(path.parent), sources={"pairs": SourceConfig(shards=[path.name])})
    tasks = PreferenceDataset(data, seed=0, key="pairs").first(limit)
    margins = []
    with open_reward_model(checkpoint) as judge:
        for task in tasks:
            answers = [task.fields["chosen"], task.fields["rejected"]]
            chosen, rejected = judge.scores(task.messages, answers, task.images)
            if chosen is None or rejected is None:
                raise UserError(f"{shard}: pair {task.uid + 1} is longer than the packs of {checkpoint}")
            margins.append(chosen - rejected)
    accuracy = fmean((margin > 0) + (margin == 0) / 2 for margin in margins)
    return {"pairs": len(margins), "accuracy": accuracy, "margin": fmean(margins)}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of tools/score_pairs.py; returns the exit code."""
    parser = argparse.ArgumentParser(prog="score_pairs", description=__doc__)
    parser.add_argument("checkpoint", help="run or checkpoint folder of a reward model")
    parser.add_argument("shards", nargs="+", help="JSONL files or tars of pairs")
    parser.add_argument("--limit", type=int, default=1000, help="pairs of each, the first ones (default 1000)")
    arguments = parser.parse_args(argv)
    quiet()
    from nemo_bluelm.rl.reward_job import resolve_reward_model  # it imports torch

    try:
        checkpoint = resolve_reward_model(arguments.checkpoint, "checkpoint")
        for shard in arguments.shards:
            print(json.dumps({"shard": shard, **score_pairs(checkpoint, shard, arguments.limit)}), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.EXIT_CODE
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
