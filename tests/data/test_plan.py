"""The plan: mixture, epochs, caps, order, state; on lengths made up."""

import json
import math
import random
from collections import Counter, defaultdict
from itertools import islice

import numpy as np
import pytest
from made_up_index import Index, Shard

from nemo_bluelm.data.plan import LOOKAHEAD, MixturePlan
from nemo_bluelm.data.table import Source
from nemo_bluelm.errors import UserError

CAP, TILES = 8192, 64


def realistic(images=3000, texts=3000):
    """Image conversations of 1 to 17 tiles of 196 tokens, and log-normal texts, of which some fill packs."""
    rng = np.random.default_rng(1)
    tiles = rng.choice([1, 3, 5, 7, 10, 13, 17], images)
    text = np.clip(rng.lognormal(6, 1.2, texts), 16, 20_000).astype(int)
    return Index(
        Shard("i.tar", tiles * 196 + rng.integers(20, 400, images), tiles),
        Shard("t.tar", text),
    )


def mixture(image=0.6, text=0.4, **changes):
    return {"images": Source(["i.tar"], image, **changes), "text": Source(["t.tar"], text)}


def plan(index=None, sources=None, seed=1, cap=CAP, **changes):
    index = realistic() if index is None else index
    return MixturePlan(index, sources or mixture(), seed, cap, changes.pop("max_tiles", TILES), **changes)


@pytest.mark.parametrize("weight", [0.2, 0.4, 0.6, 0.9])
@pytest.mark.parametrize("alignment", [1, 16])
def test_mixture_is_exact_by_tokens_and_packs_are_full(weight, alignment):
    """60:40 and others, delivered, to 0.002 after 500 packs, and full to 0.985."""
    planned, tokens, used = plan(sources=mixture(weight, 1 - weight), alignment=alignment), Counter(), 0
    for pack in islice(planned, 500):
        for piece in pack.pieces:
            tokens[planned.tables[piece.table].name] += piece.tokens
            used += -(-piece.tokens // alignment) * alignment
    assert tokens["images"] / tokens.total() == pytest.approx(weight, abs=0.002)
    assert dict(tokens) == planned.tokens()
    assert used / (500 * CAP) >= 0.985


def test_a_source_that_packs_badly_keeps_its_share():
    """Images of more than half a pack leave 40 % of it for text; 80 : 20 is kept by leaving packs short."""
    index = Index(Shard("i.tar", [4900] * 50, [17] * 50), Shard("t.tar", [100] * 500))
    planned = plan(index, mixture(0.8, 0.2))
    packs = list(islice(planned, 400))
    tokens = planned.tokens()
    assert tokens["images"] / sum(tokens.values()) == pytest.approx(0.8, abs=0.004)
    assert sum(pack.tokens for pack in packs) / (400 * CAP) < 0.8


@pytest.mark.parametrize("most", [1, 3, 10])
def test_a_pack_has_no_more_documents_than_allowed(most):
    assert max(len(pack.pieces) for pack in islice(plan(), 200)) > most
    assert max(len(pack.pieces) for pack in islice(plan(max_documents=most), 200)) == most


def test_another_number_of_documents_is_another_plan():
    state = plan(max_documents=5).state()
    with pytest.raises(UserError, match="data.max_documents is 6, but the run was planned with 5"):
        plan(max_documents=6).restore(state)


@pytest.mark.parametrize("alignment", [1, 8, 128])
@pytest.mark.parametrize("max_tiles", [17, 20, 1000])
def test_caps_hold(alignment, max_tiles):
    for pack in islice(plan(alignment=alignment, max_tiles=max_tiles), 200):
        assert pack.pieces
        assert sum(-(-piece.tokens // alignment) * alignment for piece in pack.pieces) <= CAP
        assert pack.tiles <= max_tiles


def test_every_sample_once_an_epoch_and_none_waits_for_ever():
    planned, uses, orders = plan(), Counter(), defaultdict(list)
    furthest = Counter()
    for pack in islice(planned, 3000):
        for piece in pack.pieces:
            uses[piece.table, piece.position] += 1
            orders[piece.table, planned.epoch_of(piece)].append(piece.index)
            furthest[piece.table] = max(furthest[piece.table], piece.position)
            assert piece.position > furthest[piece.table] - 10 * LOOKAHEAD
    assert set(uses.values()) == {1}
    for number, table in enumerate(planned.tables):
        for epoch in range(2):
            assert sorted(orders[number, epoch]) == list(range(len(table.tokens)))
        assert orders[number, 0] != orders[number, 1]


def test_pure_function_of_its_arguments():
    def pieces(**arguments):
        return tuple(pack.pieces for pack in islice(plan(**arguments), 50))

    assert pieces() == pieces()
    swapped = dict(reversed(mixture().items()))
    assert pieces() == pieces(sources=swapped)
    others = [pieces(seed=2), pieces(alignment=8), pieces(sources=mixture(0.5, 0.5)), pieces(max_tiles=20)]
    assert len({pieces(), *others}) == 5


def test_restored_at_any_point_it_goes_on_the_same():
    whole = list(islice(plan(), 400))
    for cut in random.Random(0).sample(range(400), 20):
        first = plan()
        assert list(islice(first, cut)) == whole[:cut]
        state = json.loads(json.dumps(first.state()))
        assert len(json.dumps(state)) < 10_000
        second = plan()
        second.restore(state)
        assert second.number == cut and second.tokens() == first.tokens()
        assert list(islice(second, 400 - cut)) == whole[cut:]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (dict(seed=2), "seed is 2, but the run was planned with 1"),
        (dict(sources=mixture(0.5)), r"data.sources.images.weight is 0.5, .* with 0.6"),
        (dict(sources=mixture(max_epochs=2.0)), r"data.sources.images.max_epochs is 2.0, .* with None"),
        (dict(alignment=8), "alignment of documents is 8, .* with 1"),
        (dict(oversize="truncate"), "data.oversize is truncate, .* with drop"),
        (dict(max_tiles=65), "data.max_tiles is 65, .* with 64"),
        (dict(sources={"images": Source(["i.tar"], 0.6)}), "data.sources.text.weight is absent, .* with 0.4"),
    ],
)
def test_another_plan_refuses_the_state_and_says_what_changed(changed, named):
    before = plan().state()
    with pytest.raises(UserError, match=named):
        plan(**changed).restore(before)


def test_other_shards_or_a_quarantine_refuse_the_state():
    before, index = plan().state(), realistic()
    index.excluded = {"t.tar": np.array([3])}
    with pytest.raises(UserError, match=r"quarantine of data.sources.text is 1 samples \(.*\), .* with none"):
        plan(index).restore(before)
    index = realistic()
    index["i.tar"].digest = "another"
    with pytest.raises(UserError, match="content of data.sources.images.shards"):
        plan(index).restore(before)


def test_a_source_leaves_at_its_last_epoch_and_the_plan_ends_with_the_last_one():
    index = realistic(images=300, texts=200)
    sources = {"images": Source(["i.tar"], 0.9, max_epochs=1.5), "text": Source(["t.tar"], 0.1, max_epochs=2)}
    planned, uses = plan(index, sources), Counter()
    for pack in planned:
        uses.update((piece.table, piece.index) for piece in pack.pieces)
    pictures, text = planned.tables
    assert {uses[0, i] for i in range(len(pictures.tokens))} == {1, 2}
    assert sum(uses[0, i] for i in range(300)) == 450
    assert {uses[1, i] for i in range(len(text.tokens))} == {2}
    assert planned.epochs() == {"images": 1.5, "text": 2.0}
    with pytest.raises(StopIteration):
        next(planned)


def test_resample_by_tag():
    index = Index(Shard("i.tar", [100] * 100, tags={"ocr": range(10), "chart": range(5, 20)}))
    sources = {"images": Source(["i.tar"], 1.0, max_epochs=1, resample={"ocr": 3, "chart": 2.0})}
    uses = Counter(piece.index for pack in plan(index, sources) for piece in pack.pieces)
    assert [uses[i] for i in (0, 9, 10, 19, 20, 99)] == [3, 3, 2, 2, 1, 1]
    with pytest.raises(UserError, match="resample.ocrs: no sample has this tag; the tags are chart, ocr"):
        plan(index, {"images": Source(["i.tar"], resample={"ocrs": 2})})
    with pytest.raises(UserError, match="resample leaves no sample"):
        everything = Index(Shard("i.tar", [100] * 3, tags={"x": range(3)}))
        plan(everything, {"images": Source(["i.tar"], resample={"x": 0})})


def test_a_rare_source_does_not_hold_back_the_stream():
    index = Index(Shard("rare.tar", [10], [1]), Shard("long.tar", [1000]))
    planned = plan(index, {"rare": Source(["rare.tar"], 1e-4), "long": Source(["long.tar"], 1.0)}, cap=1000)
    assert Counter(pack.tokens for pack in islice(planned, 30)) == {1000: 29, 10: 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(cap=100, alignment=48), "data.sequence_length is 100, not a multiple of 48.*the nearest is 96"),
        (dict(cap=1), "data.sequence_length is 1; it must be 2 or more"),
        (dict(max_tiles=0), "data.max_tiles is 0"),
        (dict(oversize="shrink"), "data.oversize is 'shrink'; it must be one of drop, truncate, error"),
        (dict(sources={"text": Source(["t.tar"], math.nan)}), "data.sources.text.weight is nan"),
        (dict(sources={"text": Source(["t.tar"], 0.0)}), "data.sources.text.weight is 0"),
        (dict(sources={"text": Source(["t.tar"], 1e-320)}), "data.sources.text.weight is 1e-320"),
        (dict(sources={"text": Source(["t.tar"], 1e308)}), "data.sources.text.weight is 1e.308.*to 1e.09"),
        (dict(sources={"text": Source(["t.tar"], max_epochs=0)}), "data.sources.text.max_epochs is 0"),
        (dict(sources={"text": Source(["t.tar"], max_epochs=1e308)}), "data.sources.text.max_epochs is 1e.308"),
        (dict(sources={"text": Source(["t.tar"], resample={"a": 1e300})}), "resample.a is 1e.300; it must be from 0"),
        (dict(sources={"text": Source([])}), "data.sources.text.shards is empty"),
        (dict(sources={"text": Source(["x-*.tar"])}), "data.sources.text.shards: 'x-.*' is not in the index"),
        (dict(sources={"text": Source(["t.tar"], resample={"a": 2})}), "no sample has this tag; they have no tags"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        plan(**arguments)
    with pytest.raises(UserError, match="data.sources is empty"):
        MixturePlan(realistic(), {}, 1)


def test_the_share_of_text_is_by_tokens_weights_and_epochs():
    """Images 3, and a source of 100 text and 300 image tokens, of which the text comes twice, 1: 1/4 * 200/500."""
    tags = {"again": [0]}
    index = Index(Shard("i.tar", [50], [1]), Shard("m.tar", [100, 300], [0, 1], tags=tags))
    sources = {"images": Source(["i.tar"], 3), "mixed": Source(["m.tar"], 1, resample={"again": 2})}
    assert plan(index, sources).text_share() == pytest.approx(0.1)
    assert plan(index, {"images": Source(["i.tar"])}).text_share() == 0
    assert plan().text_share() == pytest.approx(0.4)
