"""From the tags that records have to the factors that give key data its wanted share."""

from collections.abc import Mapping

Tags = tuple[str, ...]


def factors(lengths: Mapping[Tags, float], wanted: Mapping[str, float]) -> dict[str, float]:
    """Factor by tag, such that the tags make up their wanted shares of the length.

    A record comes as often as the largest factor among its tags says, one without any of them once. Where tags
    overlap, several shares may exclude each other; the factors then come as near as they can. Where no record is
    without these tags, nothing can be shared out and every factor is 1.

    Args:
        lengths: total length of the records by their exact set of tags, each above 0.
        wanted: share by tag, above 0 and together below 1; every tag has records.
    """
    found = dict.fromkeys(wanted, 1.0)
    if all(found.keys() & tags for tags in lengths):
        return found
    for _ in range(1000):
        have = shares(lengths, found)
        if all(abs(have[tag] - share) < 1e-9 for tag, share in wanted.items()):
            break
        for tag, share in wanted.items():
            found[tag] *= share / (1 - share) * (1 - have[tag]) / have[tag]
    return found


def shares(lengths: Mapping[Tags, float], found: Mapping[str, float]) -> dict[str, float]:
    """The share of each tag's records under these factors."""
    weights = {tags: length * _factor(tags, found) for tags, length in lengths.items()}
    total = sum(weights.values())
    return {tag: sum(weight for tags, weight in weights.items() if tag in tags) / total for tag in found}


def _factor(tags: Tags, found: Mapping[str, float]) -> float:
    return max((found[tag] for tag in tags if tag in found), default=1.0)
