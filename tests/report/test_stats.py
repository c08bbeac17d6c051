"""``data stats``: its numbers add up to those of index and plan, counted here in another way."""

from itertools import islice

import pytest

from nemo_bluelm.data.index import build_index
from nemo_bluelm.data.plan import MixturePlan
from nemo_bluelm.data.table import Source
from nemo_bluelm.geometry import Geometry
from nemo_bluelm.report.stats import data_stats

SOURCES = {
    "digits": Source(["digits-train-*.tar"], 0.6),
    "photos": Source(["photos-train-*.tar"], 0.3),
    "text": Source(["text-train-*.tar"], 0.3),
}


@pytest.fixture(scope="module")
def index(corpus, tokenizer, tmp_path_factory):
    return build_index(
        ["*-train-*.tar"], tmp_path_factory.mktemp("index"), Geometry(tile=56), tokenizer, root=str(corpus)
    )


def plan(index, sources=SOURCES, **settings) -> MixturePlan:
    return MixturePlan(index, sources, 1, **{"sequence_length": 512, "max_tiles": 64, "alignment": 8} | settings)


def test_packs_are_counted_as_the_plan_gives_them(index):
    stats = data_stats(plan(index), packs=40)
    packs = list(islice(plan(index), 40))
    pieces = [piece for pack in packs for piece in pack.pieces]
    tokens = sum(piece.tokens for piece in pieces)
    assert (stats["packs"], stats["documents"], stats["fill"]["tokens"]) == (40, len(pieces), tokens)
    fill = stats["fill"]
    assert fill["tokens"] + fill["alignment_padding"] + fill["tail_padding"] == fill["capacity"] == 40 * 512
    assert fill["alignment_padding"] == sum(-piece.tokens % 8 for piece in pieces) > 0
    assert fill["fill"] == pytest.approx(tokens / (40 * 512))
    tiles = sorted(pack.tiles for pack in packs)
    assert (stats["tiles_per_pack"]["min"], stats["tiles_per_pack"]["max"]) == (tiles[0], tiles[-1])
    assert stats["tiles_per_pack"]["median"] == (tiles[19] + tiles[20]) / 2
    assert stats["documents_per_pack"]["mean"] == pytest.approx(len(pieces) / 40)


def test_shares_are_by_tokens_and_sum_to_one(index):
    mixture = plan(index)
    stats = data_stats(mixture, packs=200)
    sources = stats["sources"]
    assert {name: source["delivered"]["tokens"] for name, source in sources.items()} == mixture.tokens()
    assert {name: source["epochs"] for name, source in sources.items()} == mixture.epochs()
    assert [source["weight"] for source in sources.values()] == pytest.approx([0.5, 0.25, 0.25])
    assert sum(source["share"] for source in sources.values()) == pytest.approx(1)
    assert sources["digits"]["share"] == pytest.approx(0.5, abs=0.01)
    records = stats["records"]
    assert records["text_tokens"] == sources["text"]["delivered"]["tokens"]
    assert records["text_share"] + records["image_share"] == pytest.approx(1)


def test_sources_are_what_the_index_holds(index):
    source = data_stats(plan(index), packs=1)["sources"]["photos"]
    shards = [index[name] for name in index if name.startswith("photos-train")]
    samples = [shard.sample(row) for shard in shards for row in range(len(shard.tokens))]
    assert (source["shards"], source["samples"], source["rejected"]) == (2, len(samples), 0)
    assert source["images"] == sum(len(sample.images) for sample in samples)
    assert source["tiles"] == sum(sample.tiles for sample in samples)
    assert source["tokens"] == sum(sample.tokens for sample in samples)
    assert source["tokens_per_image_record"] == pytest.approx(source["tokens"] / len(samples))
    assert data_stats(plan(index), packs=1)["sources"]["text"]["tokens_per_image_record"] == 0


def test_samples_that_do_not_fit_are_counted(index):
    dropping = data_stats(plan(index, sequence_length=64), packs=5)["sources"]
    cutting = data_stats(plan(index, sequence_length=64, oversize="truncate"), packs=5)["sources"]
    shards = [index[name] for name in index if name.startswith("photos-train")]
    large = sum(int(((shard.tokens > 64) | (shard.tiles > 64)).sum()) for shard in shards)
    assert dropping["photos"]["dropped"] == large > 0 and dropping["photos"]["truncated"] == 0
    assert cutting["photos"]["truncated"] > 0
    assert cutting["photos"]["truncated"] + cutting["photos"]["dropped"] == large
    assert dropping["text"]["split"] > 0 and dropping["text"]["dropped"] == 0


def test_lengths_cover_every_document(index):
    stats = data_stats(plan(index), packs=60)
    bins = stats["lengths"]
    assert sum(bin["documents"] for bin in bins) == stats["documents"]
    assert sum(bin["tokens"] for bin in bins) == stats["fill"]["tokens"]
    assert all(bin["from"] * bin["documents"] <= bin["tokens"] for bin in bins)
    assert all(bin["tokens"] <= (bin["to"] - 1) * bin["documents"] for bin in bins)
    assert all(a["to"] == b["from"] for a, b in zip(bins, bins[1:])) and bins[-1]["to"] == 513


def test_a_mixture_that_ends(index):
    short = {"photos": Source(["photos-train-*.tar"], max_epochs=1)}
    stats = data_stats(plan(index, short), packs=10_000)
    assert 0 < stats["packs"] < stats["packs_wanted"] == 10_000
    assert stats["sources"]["photos"]["delivered"]["documents"] == stats["sources"]["photos"]["samples"]
    assert stats["sources"]["photos"]["epochs"] == 1


def test_a_plan_at_its_end_has_no_packs(index):
    mixture = plan(index, {"photos": Source(["photos-train-*.tar"], max_epochs=1)})
    data_stats(mixture, packs=10_000)
    stats = data_stats(mixture, packs=5)
    assert (stats["packs"], stats["fill"]["fill"], stats["lengths"]) == (0, 0.0, [])
