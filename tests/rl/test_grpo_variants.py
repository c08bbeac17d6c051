"""Every way to learn that a recipe can name, in runs of two GRPO steps: each does what its name says."""

import pytest

from tests.rl.grpo_runs import beginner, command, curve, forks, write_recipe  # noqa: F401

pytestmark = pytest.mark.slow

KL = "grpo.loss.reference_policy_kl_penalty=0.5"
TWICE = ["grpo.num_iterations=2", "train.steps=4"]
VARIANTS = {
    "grpo": [],
    "dynamic": ["grpo.dynamic_sampling.enabled=true", "grpo.dynamic_sampling.max_gen_batches=3"],
    "overlong": ["grpo.overlong.filtering=true"],
    "punished": ["grpo.overlong.buffer_length=10", "grpo.overlong.buffer_penalty=3", "grpo.advantage.normalize=none"],
    "budget": ["grpo.thinking.budget_tokens=2", "grpo.thinking.share=1", "grpo.thinking.closing_text=so"],
    "quick": ["grpo.thinking.share=0"],
    "gdpo": ["grpo.advantage.estimator=gdpo", "+grpo.advantage.reward_weights.hashed=2"],
    "rloo": ["grpo.advantage.estimator=rloo"],
    "dr_grpo": ["grpo.advantage.estimator=dr_grpo", "grpo.loss.aggregation=seq_mean_token_sum_norm"],
    "reinforce_pp": ["grpo.advantage.estimator=reinforce_pp", "grpo.loss.policy_loss=reinforce"],
    "clipped": ["grpo.advantage.clip_low=-0.5", "grpo.advantage.clip_high=0.5", "grpo.advantage.leave_one_out=true"],
    "batch": ["grpo.advantage.normalize=batch"],
    # At the others' learning rate every sequence is clipped in the second pass.
    "gspo": ["grpo.loss.policy_loss=gspo", "grpo.loss.aggregation=seq_mean_token_mean", "optim.lr=1e-4", *TWICE],
    "cispo": ["grpo.loss.policy_loss=cispo", "grpo.loss.ratio_clip_min=1", *TWICE],
    "curriculum": ["grpo.curriculum.field=difficulty", "~data.sources.digits"],
    "dual": ["grpo.loss.ratio_clip_c=3", "grpo.loss.ratio_clip_max=0.28", *TWICE],
    "entropy": ["grpo.loss.entropy_coeff=0.5", "train.steps=4"],
    "kl": [KL, *TWICE],
    "kl_in_reward": [KL, "grpo.loss.kl_in_reward=true", "grpo.loss.reference_policy_kl_type=k1", "train.steps=4"],
    "corrected": ["grpo.loss.rollout_correction.type=icepop", "grpo.loss.rollout_correction.min=0.5"],
    "cold": ["grpo.generation.temperature=0.5", "grpo.generation.top_k=5", "grpo.generation.top_p=0.9"],
    "unscorable": [],
    "sometimes": [],
}
REWARDS = {
    "gdpo": "{hashed: {}, odd_length: {}}",
    "unscorable": "{never: {}}",
    "sometimes": "{odd_length: {}}",
    "dynamic": "{holds: {letter: e}}",
}


@pytest.fixture(scope="module")
def curves(corpus, beginner, forks, tmp_path_factory):  # noqa: F811
    """The curve of a variant; each runs once, when it is first asked for."""
    folder, found = tmp_path_factory.mktemp("variants"), {}

    def of(name):
        if name not in found:
            recipe = write_recipe(folder, REWARDS.get(name, "{hashed: {}}"), name)
            forks.run(*command(recipe, corpus, beginner, folder / name, "optim.lr=0.01", *VARIANTS[name]))
            found[name] = curve(folder / name)
        return found[name]

    return of


@pytest.mark.parametrize("name", VARIANTS)
def test_it_runs(name, curves):
    rows = curves(name)
    assert len(rows) == 4 if any("steps=4" in key for key in VARIANTS[name]) else 2
    silent = name in ("unscorable", "overlong")  # all replies of such a model are as long as they may be
    assert all((row["grad_norm"] == 0) == silent for row in rows)
    if name not in ("overlong", "sometimes", "gdpo"):
        assert [row["num_valid_samples"] for row in rows] == pytest.approx([0 if silent else 16] * len(rows))


@pytest.mark.parametrize("name", ["rloo", "dr_grpo", "batch", "reinforce_pp", "clipped", "punished", "overlong"])
def test_it_is_not_what_is_done_by_default(name, curves):
    """The first replies and rewards are the same; what is learnt from them is not."""
    plain, other = curves("grpo")[0], curves(name)[0]
    assert other["reward/mean"] == plain["reward/mean"]
    assert other["grad_norm"] != pytest.approx(plain["grad_norm"], rel=1e-3)


def test_the_penalty_in_rewards_changes_advantages_once_the_policy_has_left_the_reference(curves):
    plain, penalised = curves("grpo"), curves("kl_in_reward")
    assert penalised[0]["advantages/std"] == pytest.approx(plain[0]["advantages/std"])
    assert penalised[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=1e-4)
    assert penalised[0]["kl/ref"] == pytest.approx(0, abs=1e-6) != penalised[1]["kl/ref"]
    assert penalised[1]["reward/mean"] == pytest.approx(plain[1]["reward/mean"], abs=0.2)
    assert penalised[1]["grad_norm"] != pytest.approx(plain[1]["grad_norm"], rel=1e-3)


def test_figures_say_what_was_done(curves):
    assert curves("dynamic")[0]["dynamic_sampling/num_gen_batches"] >= 1
    assert curves("budget")[0]["rollout/thinking/budget_forced_rate"] > 0.5
    assert "rollout/thinking/think_length" not in curves("quick")[0]
    assert 0 < curves("gdpo")[0]["num_valid_samples"] < 16
    assert "reward/mean" not in curves("unscorable")[0]
    assert 0 < curves("sometimes")[0]["num_valid_samples"] < 16
    assert curves("entropy")[-1]["policy/entropy"] > curves("grpo")[0]["policy/entropy"] - 0.05
    assert curves("clipped")[0]["advantages/max"] == pytest.approx(0.5)
    assert curves("clipped")[0]["advantages/min"] == pytest.approx(-0.5)
