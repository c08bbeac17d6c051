"""GRPO raises what it rewards, well above the start, and a penalty keeps the policy near its reference."""

import json
from statistics import fmean, stdev

import pytest

from tests.rl.grpo_runs import beginner, command, curve, forks, write_recipe  # noqa: F401
from tests.rl.lessons import write_lessons
from tests.runtime.processes import TRAIN

LETTER = "{holds: {letter: v}}"  # in one reply of six before training
BANDIT = [
    *("train.steps=30", "train.save_every=1000", "optim.lr=3e-3", "grpo.thinking.share=0"),
    *("grpo.generation.max_new_tokens=8", "grpo.num_generations_per_prompt=8", "train.global_batch_size=32"),
]
SEEDS = range(3)


@pytest.fixture(scope="module")
def bandit(corpus, beginner, forks, tmp_path_factory):  # noqa: F811
    """The curve of a run of the bandit, by seed and further keys."""
    folder = tmp_path_factory.mktemp("bandit")
    recipe, found = write_recipe(folder, LETTER), {}

    def of(seed, *overrides):
        key = (seed, *overrides)
        if key not in found:
            run_dir = folder / str(len(found))
            forks.run(*command(recipe, corpus, beginner, run_dir, f"seed={seed}", *BANDIT, *overrides))
            found[key] = curve(run_dir)
        return found[key]

    return of


def share(rows):
    return fmean(row["reward/mean"] for row in rows)


@pytest.mark.slow
def test_a_bandit_is_learnt(bandit):
    rows = bandit(0)
    assert share(rows[-5:]) > share(rows[:5]) + 0.4


@pytest.mark.slow
def test_a_penalty_keeps_the_policy_near_the_reference(bandit):
    """The divergence is measured where its weight is next to nothing, and where it is large."""
    free = bandit(0, "grpo.loss.reference_policy_kl_penalty=1e-9")
    near = bandit(0, "grpo.loss.reference_policy_kl_penalty=1")
    assert near[-1]["kl/ref"] < 0.5 * free[-1]["kl/ref"]


@pytest.mark.long
def test_a_bandit_is_learnt_from_every_seed(bandit):
    curves = [bandit(seed) for seed in SEEDS]
    gains = [share(rows[-5:]) - share(rows[:5]) for rows in curves]
    print(f"bandit: {[(round(share(r[:5]), 3), round(share(r[-5:]), 3)) for r in curves]}, {told(gains)}")
    assert min(gains) > 0.3 and fmean(gains) > 3 * stdev(gains)


# ---- lessons


@pytest.fixture(scope="module")
def lessons(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lessons")
    write_lessons(folder)
    (folder / "tokenizer.json").write_bytes((corpus / "tokenizer.json").read_bytes())
    return folder


PLAIN = ["model.language.yarn.factor=1", "train.save_every=1000"]


@pytest.fixture(scope="module")
def pupil(lessons, forks, tmp_path_factory):  # noqa: F811
    """A run that was taught wrong answers as often as right ones."""
    run_dir = tmp_path_factory.mktemp("pupil") / "run"
    sources = [
        *("data.sources.digits.shards=[taught/sums.tar]", "data.sources.digits.weight=0.8"),
        *("data.sources.text.shards=[taught/greetings.tar]", "data.sources.text.weight=0.2"),
        *("~data.sources.photos", "~data.sources.prose", "~data.sources.needle"),
    ]
    settings = [f"data.root={lessons}", f"data.index={lessons}/index", f"run_dir={run_dir}", *PLAIN, *sources]
    forks.run(*TRAIN, "tiny/sft", *settings, "train.steps=500", "train.global_batch_size=2", "optim.lr=2e-3")
    return run_dir


@pytest.fixture(scope="module")
def critic(lessons, pupil, forks, tmp_path_factory):  # noqa: F811
    """A reward model of greetings."""
    run_dir = tmp_path_factory.mktemp("critic") / "run"
    settings = [f"data.root={lessons}", f"init_from={pupil}", f"run_dir={run_dir}", *PLAIN, "train.steps=40"]
    sources = ["~data.sources.digits", "data.sources.problems.shards=[pairs.jsonl]"]
    forks.run(*TRAIN, "tiny/reward_model", *settings, *sources)
    return run_dir


@pytest.fixture
def learn(lessons, pupil, forks, tmp_path):  # noqa: F811
    """Trains from every seed, side by side; what was right of the replies to held-out prompts, before and after."""

    def run(*overrides):
        folders = [tmp_path / str(seed) for seed in SEEDS]
        settings = [f"data.root={lessons}", f"init_from={pupil}", *PLAIN]
        sums = [
            *("data.sources.digits.shards=[asked/sums.tar]", "data.sources.digits.weight=0.75"),
            "grpo.validation.sources.digits=[asked/sums-test.tar]",
        ]
        keys = [
            *("train.steps=40", "optim.lr=3e-4", "optim.schedule=constant", "grpo.thinking.share=0"),
            *("grpo.validation.greedy=false", "grpo.validation.num_generations=4"),
            *("grpo.validation.period=40", "grpo.validation.max_samples=400"),
        ]
        runs = [
            forks.start(*TRAIN, "tiny/grpo", f"run_dir={folder}", f"seed={seed}", *settings, *sums, *keys, *overrides)
            for seed, folder in zip(SEEDS, folders)
        ]
        for fork in runs:
            code, output = fork.finish(timeout=480)
            assert code == 0, output[-3000:]
        rows = [(folder / "validation.jsonl").read_text().splitlines() for folder in folders]
        return [(json.loads(before), json.loads(after)) for before, after in rows]

    return run


def told(gains):
    return f"gain {fmean(gains):.3f} +- {stdev(gains):.3f}"


@pytest.mark.long
def test_sums_of_digits_in_images_are_learnt(learn):
    alone = ["~data.sources.problems", "~environments.problems", "~grpo.validation.sources.problems"]
    found = learn(*alone, "grpo.generation.max_new_tokens=8")
    pairs = [(before["val/accuracy"], after["val/accuracy"]) for before, after in found]
    gains = [after - before for before, after in pairs]
    print(f"sums: {pairs}, {told(gains)}")
    assert min(gains) > 0.05 and fmean(gains) > 2 * stdev(gains)


@pytest.mark.long
def test_a_rule_and_a_reward_model_are_obeyed_together(learn, critic):
    judged = [
        *("data.sources.problems.shards=[asked/greetings.jsonl]", "data.sources.problems.weight=0.25"),
        "grpo.validation.sources.problems=[asked/greetings.jsonl]",
        "~environments.problems.rewards.exact",
        f"+environments.problems.rewards.reward_model={{weight: 0.9, checkpoint: '{critic}', device: cpu}}",
        *("environments.problems.num_workers=1", "environments.problems.timeout=120"),
        "grpo.generation.max_new_tokens=12",
    ]
    found = learn(*judged)
    for task in ("digits", "problems"):
        pairs = [tuple(row[f"val/{task}/accuracy"] for row in rows) for rows in found]
        gains = [after - before for before, after in pairs]
        print(f"mixed, {task}: {pairs}, {told(gains)}")
        assert min(gains) > 0.05 and fmean(gains) > 2 * stdev(gains), task
