"""Advantages: numbers by hand, groups without a spread, samples that could not be scored, and what may not matter."""

import math

import pytest
import torch

from nemo_bluelm.errors import UserError
from nemo_bluelm.rl.advantage import ESTIMATORS, group_advantages, mixed_groups

BINARY = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 1, 1, 1]).double()
GROUPS = [7, 7, 7, 7, 3, 3, 3, 3, 5, 5]  # the last group: all the same


def advantages(rewards, groups, estimator="grpo", **options):
    """As of the library, with the rewards as the only component where gdpo wants some."""
    if estimator == "gdpo":
        options.setdefault("components", rewards[:, None])
    return group_advantages(rewards, groups, estimator, **options)


def close(got, expected, tolerance=1e-12):
    torch.testing.assert_close(got, torch.tensor(expected, dtype=got.dtype), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "estimator, options, expected",
    [
        ("grpo", {}, [1.5, -0.5, -0.5, -0.5, 0.5, 0.5, -1.5, 0.5, 0, 0]),
        ("grpo", {"leave_one_out": True}, [2, -2 / 3, -2 / 3, -2 / 3, 2 / 3, 2 / 3, -2, 2 / 3, 0, 0]),
        ("grpo", {"normalize": "none"}, [0.75, -0.25, -0.25, -0.25, 0.25, 0.25, -0.75, 0.25, 0, 0]),
        ("dr_grpo", {}, [0.75, -0.25, -0.25, -0.25, 0.25, 0.25, -0.75, 0.25, 0, 0]),
        ("rloo", {}, [1, -1 / 3, -1 / 3, -1 / 3, 1 / 3, 1 / 3, -1, 1 / 3, 0, 0]),
        ("grpo", {"clip_low": -0.4, "clip_high": 1.0}, [1, -0.4, -0.4, -0.4, 0.5, 0.5, -0.4, 0.5, 0, 0]),
    ],
)
def test_binary_rewards(estimator, options, expected):
    """Both mixed groups have the std 1/2 (ddof 1)."""
    close(group_advantages(BINARY, GROUPS, estimator, std_eps=0.0, **options), expected)


def test_a_winner_counts_by_the_whole_groups_deviation():
    """Without the winner the others of [1, 0, 0, 0] have none; dividing by that would leave the winner as it is."""
    close(group_advantages(BINARY[:4], [0] * 4, leave_one_out=True, std_eps=0.0), [2, -2 / 3, -2 / 3, -2 / 3])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.3, 1 / 3, 0.1, 1e7 + 0.1, -7.7, 0.0])
def test_equal_rewards_give_exactly_zero(estimator, dtype, value):
    sizes = [2, 3, 5, 7, 8, 11]
    rewards = torch.full((sum(sizes),), value, dtype=dtype)
    groups = [i for i, size in enumerate(sizes) for _ in range(size)]
    got = advantages(rewards, groups, estimator)
    assert got.dtype == dtype
    assert not got.any()


@pytest.mark.parametrize("estimator", sorted({*ESTIMATORS} - {"reinforce_pp"}))  # which looks at no groups
@pytest.mark.parametrize("normalize", ["group", "batch", "task", "none"])
def test_a_group_without_spread_beside_others(estimator, normalize):
    """Also where equal values were summed in another order, and where samples are weighed by their lengths."""
    rewards = torch.tensor([1.0, 0, 0, 0.1 + 0.2, 0.3, 0.3, 5.0, 9.0, 9.0], dtype=torch.float64)
    groups = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    options = {"lengths": torch.tensor([1, 9, 2, 4, 4, 7, 1, 2, 3])}
    if estimator in ("grpo", "dr_grpo", "rloo"):
        options |= {"normalize": normalize, "tasks": ["a"] * 6 + ["b"] * 3}
    got = advantages(rewards, groups, estimator, **options)
    assert not got[3:6].any()
    assert got[[0, 1, 2, 6, 7, 8]].all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("how", ["nan", "infinite", "mask", "both"])
@pytest.mark.parametrize("seed", range(5))
def test_unscorable_samples_count_as_absent(estimator, how, seed):
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, 6, (24,), generator=generator)
    rewards = torch.randn(24, generator=generator).double()
    good = torch.rand(24, generator=generator) < 0.7
    marked, options = rewards.where(good, {"mask": -100.0, "infinite": torch.inf}.get(how, torch.nan)), {}
    if how in ("mask", "both"):
        options = {"scorable": good if how == "mask" else torch.ones(24)}
    lengths = torch.randint(1, 9, (24,), generator=generator)
    got = advantages(marked, groups, estimator, lengths=lengths, **options)
    assert not got[~good].any()
    close(got[good], advantages(rewards[good], groups[good], estimator, lengths=lengths[good]).tolist())


@pytest.mark.parametrize("estimator", sorted({*ESTIMATORS} - {"reinforce_pp"}))
def test_alone_in_the_group(estimator):
    rewards = torch.tensor([5.0, torch.nan, 1.0, 0.0, torch.nan])
    got = advantages(rewards, ["x", "x", "y", "y", "z"], estimator)
    assert got[2] > 0 > got[3]
    assert not got[[0, 1, 4]].any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nothing_scorable_and_nothing_at_all(estimator):
    assert not advantages(torch.full((4,), torch.nan), [0, 0, 1, 1], estimator).any()
    assert advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64), estimator).shape == (0,)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("seed", range(10))
def test_order_names_and_type_dont_matter(estimator, seed):
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, 8, (40,), generator=generator)
    rewards = torch.rand(40, generator=generator)
    lengths = torch.randint(1, 50, (40,), generator=generator)
    components = torch.rand(40, 3, generator=generator)
    order = torch.randperm(40, generator=generator)

    def of(places, names, dtype):
        options = {"lengths": lengths[places], "components": components[places].to(dtype)}
        return group_advantages(rewards[places].to(dtype), names, estimator, **options)

    whole = of(torch.arange(40), groups, torch.float64)
    named = of(order, [f"prompt {i}" for i in groups[order].tolist()], torch.float64)
    close(named, whole[order].tolist(), 1e-10)
    close(of(order, groups[order] * 1000 - 7, torch.float32).double(), whole[order].tolist(), 1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_grpo_is_centred_and_looks_at_no_scale(seed):
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(8).repeat_interleave(5)
    rewards = torch.randn(40, generator=generator).double()
    base = group_advantages(rewards, groups, std_eps=0.0)
    close(base.view(8, 5).sum(1), [0.0] * 8)
    close(base.view(8, 5).std(1), [1.0] * 8)
    scale = torch.rand(8, generator=generator).double()[groups] * 100 + 0.01
    close(group_advantages(rewards * scale - 3 * scale, groups, std_eps=0.0), base.tolist(), 1e-9)


def test_a_loud_task_does_not_drown_a_quiet_one():
    """Rewards of the second task are a thousand times the first's: the scale of its own task makes up for that."""
    quiet = torch.tensor([0.0, 1, 1, 1, 0, 0]).double()
    rewards, tasks = torch.cat((quiet, 1000 * quiet)), ["quiet"] * 6 + ["loud"] * 6
    groups = torch.arange(4).repeat_interleave(3)
    got = group_advantages(rewards, groups, normalize="task", tasks=tasks, std_eps=0.0)
    close(got[:6], ((quiet - torch.tensor([2, 2, 2, 1, 1, 1]) / 3) / math.sqrt(0.3)).tolist(), 1e-7)
    close(got[6:], got[:6].tolist())
    over_all = group_advantages(rewards, groups, normalize="batch")
    close(over_all[6:] / over_all[:6], [1000.0] * 6, 1e-6)


def test_gdpo_hears_every_component():
    """Two ways to a sum of 1 are the same to grpo, and differ here (the example of arXiv 2601.05242)."""
    components = torch.tensor([[1.0, 0], [0, 1], [0, 0], [1, 1], [0, 0], [1, 0]]).double()
    groups = [0, 0, 0, 1, 1, 1]
    got = group_advantages(components.sum(1), groups, "gdpo", components=components, std_eps=0.0)
    a, b = 2 / math.sqrt(3), -1 / math.sqrt(3)
    sums = torch.tensor([a + b, b + a, 2 * b, b * -1 + a, 2 * b, -b + b]).double()
    # The first component of the second group is [1, 0, 1]: deviations 1/3, -2/3, 1/3 over its std 1/sqrt(3).
    sums[3:] = torch.tensor([-b, 2 * b, -b]).double() + torch.tensor([a, b, b]).double()
    close(got, ((sums - sums.mean()) / sums.std()).tolist())


def test_gdpo_weights_of_each_sample_and_a_component_that_weighs_nothing():
    components = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.3, 0.1], [0.3, 0.9]], dtype=torch.float64)
    groups = [0, 0, 1, 1]

    def of(weights):
        return group_advantages(components.sum(1), groups, "gdpo", components=components, weights=weights)

    assert of([1.0, 0.0]).tolist() == pytest.approx(of(torch.tensor([[1.0, 0.0]] * 4)).tolist())
    assert of([1.0, 0.0])[2:].tolist() == [0, 0], "what differs in the second group weighs nothing"
    mixed = of(torch.tensor([[1.0, 0.0]] * 2 + [[0.0, 1.0]] * 2))
    assert mixed[0] < 0 < mixed[1] and mixed[2] < 0 < mixed[3]


def test_gdpo_weights_and_a_dead_component():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(12, generator=generator).double()
    groups = torch.arange(3).repeat_interleave(4)
    other = torch.rand(12, generator=generator).double()
    alone = advantages(rewards, groups, "gdpo")

    def beside(component, weights):
        components = torch.stack((rewards, component), 1)
        return advantages(rewards, groups, "gdpo", components=components, weights=weights)

    close(beside(torch.full((12,), 0.3), [1.0, 5.0]), alone.tolist())
    close(beside(other, [2.0, 0.0]), alone.tolist(), 1e-5)  # std_eps is not scaled along
    close(beside(torch.full((12,), torch.nan), [1.0, 5.0]), alone.tolist())
    assert (beside(other, [1.0, 1.0]) - alone).abs().max() > 0.1


def test_lengths_weigh_the_batch():
    """A sample of three tokens counts as three samples of one."""
    rewards, lengths = torch.tensor([1.0, 0.0, 0.5]).double(), torch.tensor([3, 1, 1])
    got = group_advantages(rewards, [0, 0, 0], "reinforce_pp", lengths=lengths)
    spread = group_advantages(rewards.repeat_interleave(lengths), [0] * 5, "reinforce_pp")
    close(got, spread[[0, 3, 4]].tolist())


def test_mixed_groups():
    rewards = [1, 0, 1, 1, torch.nan, 1, 0, torch.nan, 2, 2 + 1e-9, 2, 2 + 1e-7]
    rewards, groups = torch.tensor(rewards, dtype=torch.float64), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert mixed_groups(rewards, groups).tolist() == [True] * 2 + [False] * 8 + [True] * 2
    scorable = torch.tensor([True, False] * 6)
    assert not mixed_groups(rewards, groups, scorable).any()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"estimator": "gae"}, "estimator 'gae' is unknown"),
        ({"normalize": "prompt"}, "normalize 'prompt' is unknown"),
        ({"normalize": "task"}, "needs the samples' tasks"),
        ({"estimator": "gdpo"}, "needs the rewards' components"),
    ],
)
def test_mistakes(options, words):
    with pytest.raises(UserError, match=words):
        group_advantages(BINARY, GROUPS, **options)
