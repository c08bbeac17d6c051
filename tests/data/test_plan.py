"""The plan: mixture, epochs, caps, determinism; on lengths made up."""

import random
from collections import Counter, defaultdict

import pytest

from nemo_bluelm.data.plan import Plan, PlanSource, permutation


def sources(seed=0, weights=(0.6, 0.4)):
    rng = random.Random(seed)
    images = [rng.randint(20, 900) for _ in range(300)]
    texts = [rng.choice((1000, rng.randint(5, 1000))) for _ in range(120)]
    return [
        PlanSource("images", weights[0], images, [length // 90 for length in images]),
        PlanSource("text", weights[1], texts, [0] * len(texts)),
    ]


def test_mixture_is_exact_by_tokens():
    parts = sources()
    plan, tokens = Plan(parts, seed=1, token_cap=1000, tile_cap=12), [0, 0]
    for i in range(300):
        for draw in plan.pack(i):
            tokens[draw.source] += parts[draw.source].tokens[draw.sample]
    assert tokens[0] / sum(tokens) == pytest.approx(0.6, abs=0.02)
    drawn = plan.tokens_drawn()
    assert drawn[0] / sum(drawn) == pytest.approx(0.6, abs=1000 / sum(drawn))


def test_every_sample_once_an_epoch():
    parts = sources()
    plan = Plan(parts, seed=1, token_cap=1000, tile_cap=12)
    uses, orders = Counter(), defaultdict(list)
    for i in range(900):
        for draw in plan.pack(i):
            uses[draw] += 1
            orders[draw.source, draw.epoch].append(draw.sample)
    assert set(uses.values()) == {1}
    for source, part in enumerate(parts):
        last = max(epoch for s, epoch in orders if s == source)
        assert last >= 3
        for epoch in range(last - 1):  # samples of the last two epochs may still wait in the window
            assert sorted(orders[source, epoch]) == list(range(len(part.tokens)))
        assert orders[source, 0] != orders[source, 1]


@pytest.mark.parametrize("alignment", [1, 8, 100])
@pytest.mark.parametrize("tile_cap", [10, 12, 1000])
def test_caps_hold_and_packs_are_full(alignment, tile_cap):
    parts = sources()
    plan = Plan(parts, seed=2, token_cap=1000, tile_cap=tile_cap, alignment=alignment)
    fill = 0
    for i in range(300):
        draws = plan.pack(i)
        assert draws
        lengths = [parts[d.source].tokens[d.sample] for d in draws]
        assert sum(-(-length // alignment) * alignment for length in lengths) <= 1000
        assert sum(parts[d.source].tiles[d.sample] for d in draws) <= tile_cap
        fill += sum(lengths)
    if alignment == 1:
        assert fill / 300 / 1000 > 0.9


def test_pure_function_of_its_arguments():
    def packs(seed=1, alignment=1, weights=(0.6, 0.4)):
        plan = Plan(sources(weights=weights), seed=seed, token_cap=1000, tile_cap=12, alignment=alignment)
        return [plan.pack(i) for i in range(50)]

    assert packs() == packs()
    assert len({tuple(p) for p in (packs(), packs(seed=2), packs(alignment=8), packs(weights=(0.5, 0.5)))}) == 4
    late = Plan(sources(), seed=1, token_cap=1000, tile_cap=12)
    assert late.pack(49) == packs()[49] and late.pack(3) == packs()[3]


def test_rare_source_does_not_hold_back_the_stream():
    """A pack that only a rare source could fill leaves the window in time."""
    parts = [PlanSource("rare", 1e-4, [10], [1]), PlanSource("long", 1.0, [1000], [0])]
    plan = Plan(parts, seed=0, token_cap=1000, tile_cap=4)
    plan.pack(10)
    assert sum(plan.tokens_drawn()) < 60_000


def test_permutation_is_frozen():
    """These values must never change: a stream resumed after an upgrade depends on them."""
    assert permutation(1234, "digits", 0, 8).tolist() == [2, 3, 7, 0, 1, 6, 5, 4]
    assert sorted(permutation(5, "x", 3, 1000).tolist()) == list(range(1000))
    assert permutation(5, "x", 3, 1000).tolist() != permutation(5, "x", 4, 1000).tolist()


def test_no_pack_before_the_first():
    with pytest.raises(IndexError):
        Plan(sources(), seed=0, token_cap=1000, tile_cap=12).pack(-1)
