"""Which rank gets which pack: one global order, whatever the number of ranks and wherever a run stopped."""

from itertools import islice

import pytest
import torch

from nemo_bluelm.config.schema import DataConfig, SourceConfig
from nemo_bluelm.data.open import open_data
from nemo_bluelm.errors import UserError
from nemo_bluelm.geometry import Geometry
from nemo_bluelm.runtime.environment import prepare

GLOBAL_BATCH = 8


@pytest.fixture
def make(corpus, tmp_path, monkeypatch):
    """The packs of one of several data-parallel ranks, from a plan's state on."""
    prepare()
    from nemo_bluelm.runtime import data

    def make(rank, ranks, state=None, threads=2, at_end=None, micro_batch=1, **changes):
        monkeypatch.setattr(data.parallel_state, "get_data_parallel_rank", lambda: rank)
        monkeypatch.setattr(data.parallel_state, "get_data_parallel_world_size", lambda: ranks)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)
        images, text = (
            SourceConfig(["digits-train-*.tar"], 0.6, **changes),
            SourceConfig(["text-*.tar"], 0.4, **changes),
        )
        config = DataConfig(
            str(corpus), index=str(tmp_path / "index"), sequence_length=512, sources={"images": images, "text": text}
        )
        loader = open_data(config, Geometry(tile=56), seed=5)
        if state is not None:
            loader.plan.restore(state)
        return data.RankPacks(loader, GLOBAL_BATCH, micro_batch, threads, ahead=3, at_end=at_end)

    return make


def steps(make, count, ranks, state=None):
    """Tokens of the packs of ``count`` steps in the global order, and the state after them, from every rank."""
    dealt, states = [], []
    for rank in range(ranks):
        packs = make(rank, ranks, state)
        done = state["packs"] if state else 0
        dealt.append([pack.tokens for pack in islice(packs, count * GLOBAL_BATCH // ranks)])
        states.append(packs.state(done + count * GLOBAL_BATCH))
    assert all(other == states[0] for other in states)
    return [dealt[i % ranks][i // ranks] for i in range(count * GLOBAL_BATCH)], states[0]


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.fixture
def whole(make):
    return steps(make, 4, ranks=1)[0]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_share_one_order(ranks, make, whole):
    assert same(steps(make, 4, ranks)[0], whole)


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (1, 8)])
def test_another_number_of_ranks_goes_on_in_the_same_order(before, after, make, whole):
    """What was loaded ahead before the stop doesn't count as delivered."""
    first, state = steps(make, 2, before)
    second, _ = steps(make, 2, after, state)
    assert state["packs"] == 2 * GLOBAL_BATCH
    assert same(first + second, whole)


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 2), (2, 4), (4, 2)])
def test_a_micro_batch_joins_a_ranks_packs_in_their_order(ranks, micro_batch, make, whole):
    for rank in range(ranks):
        packs = make(rank, ranks, micro_batch=micro_batch)
        joined = list(islice(packs, 2 * GLOBAL_BATCH // ranks // micro_batch))
        mine = whole[rank : 2 * GLOBAL_BATCH : ranks]
        assert torch.equal(torch.cat([batch.tokens for batch in joined], 1), torch.cat(mine, 1))
        assert {batch.tokens.size(1) for batch in joined} == {512 * micro_batch}
        assert packs.state(GLOBAL_BATCH)["packs"] == GLOBAL_BATCH


@pytest.mark.parametrize("threads", [0, 3])
def test_the_end_of_the_data_is_known_before_its_last_whole_step(threads, make):
    ends, seen = [], 0
    packs = make(1, 2, threads=threads, at_end=ends.append, max_epochs=0.05)
    for _ in packs:
        seen += 1
        if seen == 1 + GLOBAL_BATCH // 2:
            packs.state(GLOBAL_BATCH)
    (end,) = ends
    assert end > GLOBAL_BATCH and end % GLOBAL_BATCH == 0 and seen == end // 2
    with pytest.raises(UserError, match="no further step of train.global_batch_size 8 packs.*max_epochs"):
        next(iter(make(0, 2, state=packs.state(end), max_epochs=0.05)))
