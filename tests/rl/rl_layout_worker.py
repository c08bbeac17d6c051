"""Losses and metrics under torchrun: every rank with its part of the tokens, or with its own responses.

torchrun --nproc-per-node=2 rl_layout_worker.py OUT
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from rl_batches import VARIANTS, Responses, loss_of, share  # noqa: E402

from nemo_bluelm.rl.correction import rollout_correction  # noqa: E402
from nemo_bluelm.rl.loss import AGGREGATIONS, policy_loss  # noqa: E402
from nemo_bluelm.rl.metrics import Tally, add_advantages, add_mismatch, add_policy  # noqa: E402


def compute(whole: Responses, places: torch.Tensor, group, split_within: bool) -> tuple[dict, dict, dict]:
    """(loss, gradient) of every variant, figures, weights, from the tokens at ``places`` on this rank."""
    part = whole.take(places)
    context = group if split_within else None
    losses = {}
    for i, variant in enumerate(VARIANTS):
        for aggregation in AGGREGATIONS:
            normalizer = share(part, aggregation, context)
            if group is not None:
                torch.distributed.all_reduce(normalizer, group=group)
            losses[i, aggregation] = loss_of(part, variant, aggregation, normalizer, context)
    correction = rollout_correction(
        part.old_logp,
        part.ref_logp,
        part.mask,
        "seq_mask_tis",
        lower=0.9,
        upper=1.1,
        segments=part.segments(context),
    )
    loss = policy_loss(part.logp, part.old_logp, part.advantages, part.mask)
    tally = Tally()
    add_policy(tally, loss, part.logp, part.old_logp, part.mask, segments=part.segments(context))
    add_mismatch(tally, part.old_logp, part.ref_logp, part.mask, correction)
    add_advantages(tally, part.advantages, part.mask)
    if group is not None:
        tally.all_reduce(group)
    return losses, tally.results(), {"weights": correction.weights}


def parts(whole: Responses, ranks: int) -> dict[str, list[torch.Tensor]]:
    """By layout the tokens of each rank, padded: "context" cuts every response, "data" deals out whole ones."""
    pads = torch.full((3,), -1)
    places = torch.arange(len(whole.ids))
    return {
        "context": [torch.cat((places[rank::ranks], pads)) for rank in range(ranks)],
        "data": [torch.cat((places[whole.ids % ranks == rank], pads)) for rank in range(ranks)],
    }


def main(out: str) -> None:
    torch.distributed.init_process_group("gloo")
    group = torch.distributed.group.WORLD
    whole = Responses.draw(3)
    found = {
        layout: compute(whole, places[group.rank()], group, layout == "context")
        for layout, places in parts(whole, group.size()).items()
    }
    torch.save(found, f"{out}/rank{group.rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
