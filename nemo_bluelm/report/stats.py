"""What a mixture delivers: shares, fill, padding and lengths, computed from index and plan. Decodes nothing."""

import time
from itertools import islice
from typing import Any

import numpy as np

from nemo_bluelm.data.packs import padded_length
from nemo_bluelm.data.plan import MixturePlan
from nemo_bluelm.data.table import SourceTable


def data_stats(plan: MixturePlan, packs: int = 500) -> dict[str, Any]:
    """Plan the next ``packs`` packs and count what is in them, and what the index says of their sources.

    The plan has moved on by that many packs afterwards, or by fewer where its sources end before.

    Returns:
        Plain numbers, lists and dicts by name. Shares and fill are fractions of 1; ``images``, ``tokens`` and
        ``tiles`` of a source are those of all its good samples, ``delivered`` those of the packs counted here.
    """
    begin = time.perf_counter()
    counted = [pack.pieces for pack in islice(plan, packs)]
    seconds = time.perf_counter() - begin
    pieces = [piece for pack in counted for piece in pack]
    table = np.array([piece.table for piece in pieces], np.int64)
    tokens = np.array([piece.tokens for piece in pieces], np.int64)
    tiles = np.array([piece.tiles for piece in pieces], np.int64)
    pack = np.repeat(np.arange(len(counted)), [len(pack) for pack in counted])

    total, weights = int(tokens.sum()), sum(t.source.weight for t in plan.tables)
    epochs = plan.epochs()
    sources = {}
    for number, source in enumerate(plan.tables):
        mine = table == number
        sources[source.name] = _of_index(source) | {
            "weight": source.source.weight / weights,
            "share": _fraction(tokens[mine].sum(), total),
            "delivered": {
                "documents": int(mine.sum()),
                "tokens": int(tokens[mine].sum()),
                "tiles": int(tiles[mine].sum()),
            },
            "epochs": epochs[source.name],
        }
    image_tokens = int(tokens[tiles > 0].sum())
    padded = padded_length(tokens, plan.alignment)
    capacity = len(counted) * plan.sequence_length
    return {
        "packs": len(counted),
        "packs_wanted": packs,
        "documents": len(pieces),
        "sequence_length": plan.sequence_length,
        "max_tiles": plan.max_tiles,
        "alignment": plan.alignment,
        "sources": sources,
        "records": {
            "text_tokens": total - image_tokens,
            "image_tokens": image_tokens,
            "text_share": _fraction(total - image_tokens, total),
            "image_share": _fraction(image_tokens, total),
        },
        "fill": {
            "tokens": total,
            "capacity": capacity,
            "fill": _fraction(total, capacity),
            "alignment_padding": int((padded - tokens).sum()),
            "tail_padding": capacity - int(padded.sum()),
        },
        "tiles_per_pack": _spread(np.bincount(pack, tiles, len(counted)).astype(np.int64)),
        "documents_per_pack": _spread(np.bincount(pack, minlength=len(counted))),
        "lengths": _histogram(tokens, plan.sequence_length),
        "planning": {"seconds": seconds, "samples_per_second": len(pieces) / seconds if seconds else 0.0},
    }


def _of_index(table: SourceTable) -> dict[str, Any]:
    """A source's good samples before any limit, and what became of them."""
    shards, counts = table.shards, table.counts
    with_images = sum(int((shard.tiles > 0).sum()) for shard in shards)
    image_tokens = sum(int(shard.tokens[shard.tiles > 0].sum()) for shard in shards)
    return {
        "shards": len(shards),
        "samples": counts.samples,
        "rejected": counts.rejected,
        "excluded": counts.excluded,
        "split": counts.split,
        "truncated": counts.truncated,
        "dropped": counts.dropped,
        "torn_shards": sum(shard.torn is not None for shard in shards),
        "unused": table.unused(),
        "images": sum(shard.num_images for shard in shards),
        "tokens": sum(shard.num_tokens for shard in shards),
        "tiles": sum(int(shard.tiles.sum(dtype=np.int64)) for shard in shards),
        "image_records": with_images,
        "tokens_per_image_record": _fraction(image_tokens, with_images),
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    """Smallest, 5 %, median, 95 % and largest value, and the mean."""
    if not len(values):
        return dict.fromkeys(("min", "p5", "median", "p95", "max", "mean"), 0)
    low, p5, median, p95, high = np.percentile(values, [0, 5, 50, 95, 100])
    return {"min": int(low), "p5": p5, "median": median, "p95": p95, "max": int(high), "mean": float(values.mean())}


def _histogram(lengths: np.ndarray, longest: int) -> list[dict[str, int]]:
    """Documents and their tokens by length, in bins that double: ``from`` <= length < ``to``."""
    if not len(lengths):
        return []
    exponent = np.frexp(lengths)[1] - 1  # of the largest power of two that isn't above the length
    first, last = int(exponent.min()), int(exponent.max())
    bins = []
    for power in range(first, last + 1):
        mine = lengths[exponent == power]
        end = min(2 ** (power + 1), longest + 1)
        bins.append({"from": 2**power, "to": end, "documents": len(mine), "tokens": int(mine.sum())})
    return bins


def _fraction(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
