"""The reward model: its loss by the formula, layouts, that it learns, what it is worth as a reward, and mistakes."""

import io
import json
import math
import random
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.config.rewards import EnvironmentConfig
from nemo_bluelm.config.schema import DataConfig, SourceConfig
from nemo_bluelm.errors import UserError
from nemo_bluelm.rl.environments import Environments, Episode, Said
from nemo_bluelm.rl.environments.compose import Composition
from nemo_bluelm.rl.preferences import Encoder, PreferenceDataset, lay, pack_pairs
from nemo_bluelm.runtime.run_dir import read_metrics
from tests.conftest import one_line
from tests.runtime.forks import Forks
from tests.runtime.processes import TRAIN, run
from tests.tiny_checkpoint import tiny_checkpoint  # noqa: F401  (a fixture)

THINGS = ("picture", "number")


def png(width: int = 8, red: int = 200) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, 8), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


def pairs(count: int, seed: int, images: Path | None = None) -> list[dict]:
    """Right is the answer that names what the question asks for, so neither of them tells alone which of two is."""
    rng, found = random.Random(seed), []
    for number in range(count):
        asked, other = rng.sample(THINGS, 2)
        few = " ".join(rng.choices(("please", "describe", "seven", "nine"), k=rng.randint(1, 5)))
        content = f"{few}: the {asked}?"
        record = {"messages": [{"role": "user", "content": content}], "chosen": f"a {asked}", "rejected": f"a {other}"}
        if images is not None and number % 3 == 0:
            (images / f"{number}.png").write_bytes(png(8 + 200 * (number % 2), number))
            record["messages"][0]["content"] = [{"type": "image"}, {"type": "text", "text": content}]
            record["images"] = [f"{number}.png"]
        found.append(record)
    return found


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def train(tiny_checkpoint, tmp_path_factory):  # noqa: F811
    """Trains on the ``pairs.jsonl`` of a folder, and returns the metrics."""
    forks = Forks(tmp_path_factory.mktemp("forks"))

    def run(data: Path, run_dir: Path, *overrides: str, ranks: int = 1) -> list[dict]:
        checkpoint = [f"init_from={tiny_checkpoint}", f"data.tokenizer={tiny_checkpoint}/tokenizer.json"]
        sources = [f"data.root={data}", "~data.sources.digits", "data.sources.problems.shards=[pairs.jsonl]"]
        keys = [*checkpoint, *sources, f"run_dir={run_dir}", "optim.warmup_steps=0", *overrides]
        forks.run(*TRAIN, "tiny/reward_model", *keys, ranks=ranks)
        return read_metrics(run_dir)

    yield run
    forks.close()


@pytest.fixture(scope="module")
def learnt(train, tmp_path_factory):
    """Run folder of a reward model that was trained from random weights, with its metrics."""
    folder = tmp_path_factory.mktemp("learnt")
    write(folder / "pairs.jsonl", pairs(400, 0))
    rows = train(folder, folder / "run", "optim.lr=1e-3", "train.steps=100", "train.save_every=50")
    return folder / "run", rows


@pytest.fixture
def world():
    from nemo_bluelm.runtime.environment import prepare

    prepare()
    from nemo_bluelm.runtime.single import single_process_world

    with single_process_world():
        yield


def read(path: Path) -> PreferenceDataset:
    data = DataConfig(root=str(path.parent), sources={"pairs": SourceConfig(shards=[path.name])})
    return PreferenceDataset(data, seed=0)


# ---- the loss


def test_the_loss_is_the_formula_on_dense_logits(world, tiny_checkpoint, tmp_path):  # noqa: F811
    """With a row of the output layer as its head a model's scores are that token's logits at each answer's end."""
    from nemo_bluelm.config.schema import geometry_of
    from nemo_bluelm.rl.reward_model import PairLoss, add_reward_head, scores
    from nemo_bluelm.runtime.single import load_model

    model, recipe, tokenizer = load_model(tiny_checkpoint)
    geometry = geometry_of(recipe.model)
    encoder = Encoder(tokenizer, geometry, recipe.data.chat.control_token)
    dataset = read(write(tmp_path / "pairs.jsonl", pairs(9, 1, tmp_path)))
    made = [encoder.pair(task) for task in dataset.first(9)]
    assert {len(pair.chosen.tiles) for pair in made} >= {0, 1}
    token = 77
    margins = []
    with torch.no_grad():
        for pair in made:
            alone = [lay([one], len(one.document.tokens), tokenizer.pad, geometry.tile) for one in pair]
            chosen, rejected = (model(batch)[0, -1, token].item() for batch in alone)
            margins.append(chosen - rejected)
    expected = sum(-math.log(1 / (1 + math.exp(-margin))) for margin in margins)

    add_reward_head(model)
    packs = pack_pairs(made, 256, 8, 6, tokenizer.pad, geometry.tile)
    assert len(packs) > 1 and all(len(pack.ends) % 2 == 0 for pack in packs)
    with torch.no_grad():
        assert not any(scores(model, pack).any() for pack in packs)  # it starts at zero
        model.language.reward_head.weight.copy_(model.language.embedding.word_embeddings.weight[token : token + 1])
    reduction, told, total, count = PairLoss(), [], 0.0, 0
    for pack in packs:
        loss, pairs_here, report = reduction.forward(pack, scores(model, pack))
        loss.backward()
        total, count = total + loss.item(), count + pairs_here.item()
        told.append(report)
    assert count == len(made)
    assert total == pytest.approx(expected, rel=1e-5)
    assert reduction.reduce(told).item() == pytest.approx(expected / count, rel=1e-5)
    accuracy, margin = reduction.others.tolist()
    assert accuracy == pytest.approx(sum(m > 0 for m in margins) / count)
    assert margin == pytest.approx(sum(margins) / count, abs=1e-5)
    without = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert not without


def test_a_pack_of_nothing(world, tiny_checkpoint):  # noqa: F811
    """A rank whose pairs were all left out still takes part in the step."""
    from nemo_bluelm.rl.reward_model import PairLoss, add_reward_head, scores
    from nemo_bluelm.runtime.single import load_model

    model, recipe, tokenizer = load_model(tiny_checkpoint)
    add_reward_head(model)
    (pack,) = pack_pairs([], 64, 8, 8, tokenizer.pad, recipe.model.geometry.tile)
    loss, count, _ = PairLoss().forward(pack, scores(model, pack))
    loss.backward()
    assert loss.item() == 0 and count.item() == 0
    assert not model.language.reward_head.weight.grad.any()


# ---- runs


def test_it_learns(learnt, tmp_path):
    from nemo_bluelm.rl.reward_job import resolve_reward_model

    run_dir, rows = learnt
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # all scores are 0
    assert rows[-1]["loss"] < 0.3 and rows[-1]["accuracy"] > 0.9 and rows[-1]["margin"] > 1
    assert rows[-1]["bad_samples"] == 0 and rows[-1]["tokens_by_source"] == {"problems": 3200}
    held_out = write(tmp_path / "held_out.jsonl", pairs(60, 1))
    found = json.loads(run("tools/score_pairs.py", str(run_dir), str(held_out)).splitlines()[-1])
    assert found["pairs"] == 60 and found["accuracy"] > 0.85 and found["margin"] > 1
    assert resolve_reward_model(str(run_dir), "checkpoint").name == "step_00000100"


def test_layouts_and_resume(train, tmp_path):
    """Data and tensor parallelism, rows cut over tensor ranks, and a run that goes on: the same steps."""
    write(tmp_path / "pairs.jsonl", pairs(40, 0, tmp_path))
    keys = ("train.steps=3", "train.global_batch_size=10", "optim.lr=1e-3", "data.sequence_length=256")
    whole = train(tmp_path, tmp_path / "whole", *keys, "train.save_every=2")
    assert whole[-1]["loss"] != pytest.approx(whole[0]["loss"], abs=1e-3)
    layouts = {"data": (), "tensor": ("parallel.tensor=2", "parallel.sequence=true")}
    others = {name: train(tmp_path, tmp_path / name, *keys, *layout, ranks=2) for name, layout in layouts.items()}
    last = tmp_path / "whole" / "checkpoints" / "step_00000003"
    last.rename(tmp_path / "away")
    others["resumed"] = train(tmp_path, tmp_path / "whole", *keys, "train.save_every=2")
    for name, rows in others.items():
        assert len(rows) == 3
        for expected, row in zip(whole, rows):
            for figure in ("loss", "accuracy", "margin", "grad_norm", "tokens"):
                assert row[figure] == pytest.approx(expected[figure], rel=1e-4, abs=1e-5), (name, figure)
    assert others["resumed"][2]["loss"] == whole[2]["loss"]


# ---- the reward


def environment(learnt, **options) -> EnvironmentConfig:
    schema = OmegaConf.structured(EnvironmentConfig)
    rewards = {"reward_model": {"checkpoint": str(learnt[0]), "device": "cpu", **options}}
    given = {"rewards": rewards, "num_workers": 1, "timeout": 60}
    return OmegaConf.to_object(OmegaConf.merge(schema, given))


def episode(answer: str, thought: str | None = None, content="please seven: the number?", images=()) -> Episode:
    return Episode("task", {}, Said(thought, answer), messages=[{"role": "user", "content": content}], images=images)


def test_the_reward_ranks_answers(learnt):
    with Environments({"task": environment(learnt)}) as environments:
        right, wrong, thought, again = environments.step(
            [
                episode("a number"),
                episode("a picture"),
                episode("a number", "a picture"),
                episode("a number"),
            ]
        )
    assert 0 < wrong.value < 0.5 < right.value < 1
    assert right.correct and not wrong.correct
    assert thought.value == again.value == right.value  # thoughts are not scored


def test_raw_scores_have_the_range_that_they_are_declared_to_have(learnt):
    """Here in this process: the model is one and the same."""
    logistic = Composition(environment(learnt), "task")
    raw = Composition(environment(learnt, sigmoid=False, range=[-100, 100]), "task")
    narrow = Composition(environment(learnt, sigmoid=False, range=[0, 1e-3]), "task")
    values = {}
    for made in (logistic, raw, narrow):
        made.open()
        try:
            values[made] = made.reward(episode("a number"))
            assert made.reward(episode("seven " * 600)).value is None
            pictured = [{"type": "image"}, {"type": "text", "text": "please seven: the number?"}]
            seen, other = (made.reward(episode("a number", None, pictured, (png(red=red),))) for red in (0, 200))
            assert len({seen.value, other.value, values[made].value}) == 3 or made is narrow
            assert "image" in made.reward(episode("a number", images=(png(),))).reason  # the prompt names none
            assert "prompt" in made.reward(Episode("task", {"prompt": "the number?"}, Said(None, "a number"))).reason
        finally:
            made.close()
    score = values[raw].value * 200 - 100
    assert values[logistic].value == pytest.approx(1 / (1 + math.exp(-score)), rel=1e-4)
    assert values[narrow].value is None and "not in the range" in values[narrow].reason


# ---- mistakes


@pytest.mark.parametrize(
    "record, words",
    [
        ({"prompt": "a", "chosen": "b"}, "rejected is None; it must be an answer in text"),
        ({"prompt": "a", "chosen": "b", "rejected": ["c"]}, "rejected is ['c']"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are both 'b'"),
        ({"chosen": "b", "rejected": "c"}, "it has no messages, prompt or problem"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
            | {"chosen": "b", "rejected": "c"},
            "its messages end with an answer",
        ),
    ],
)
def test_records_that_are_no_pairs(tmp_path, record, words):
    with pytest.raises(UserError) as caught:
        read(write(tmp_path / "pairs.jsonl", [pairs(1, 0)[0], record]))
    assert words in str(caught.value) and "line 2" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override, words",
    [
        ("parallel.pipeline=2", "parallel.pipeline is 2"),
        ("parallel.context=2", "parallel.context is 2"),
        ("train.micro_batch_size=2", "train.micro_batch_size is 2; with objective reward_model it must be 1"),
        ("data.max_documents=1", "the answers of a pair lie in one pack"),
        ("data.oversize=truncate", "half an answer is another answer"),
        ("distill.teacher=some", "distill is set"),
        ("train.cuda_graphs=true", "steps of a reward model have no fixed shape"),
        ("+rewards@environments.math=math", "environments is set, but objective is reward_model"),
        ("data.root=/nowhere", "/nowhere"),
    ],
)
def test_recipes_that_can_not_be(cli, tmp_path, override, words):
    code, _, error = cli("train", "tiny/reward_model", "init_from=null", f"run_dir={tmp_path}", override)
    assert words in one_line(code, error)


def test_rewards_that_can_not_be(learnt, tiny_checkpoint):  # noqa: F811
    for options, words in (
        ({"checkpoint": None}, "checkpoint is null"),
        ({"checkpoint": "/nowhere"}, "/nowhere, which does not exist"),
        ({"checkpoint": str(tiny_checkpoint)}, "is no reward model; train one with objective=reward_model"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"temperature": 1}, "temperature"),
    ):
        with pytest.raises(UserError) as caught:
            Composition(environment(learnt, **options), "task")
        assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tiny/reward_model", "reward_model"])
def test_recipes(name):
    from nemo_bluelm.config.checks import check_recipe

    check_recipe(load_recipe(name, ["init_from=a", "data.root=b"]), None)


def test_pairs_that_do_not_fit_are_left_out_or_told(train, tmp_path):
    records = pairs(12, 0)
    records[5]["chosen"] = "seven " * 400
    write(tmp_path / "pairs.jsonl", records)
    keys = ("train.steps=2", "train.global_batch_size=6", "data.sequence_length=256")
    rows = train(tmp_path, tmp_path / "run", *keys)
    assert rows[-1]["bad_samples"] == 1 and rows[-1]["tokens_by_source"] == {"problems": 12}
    with pytest.raises(AssertionError, match="a pair has .* tokens, data.sequence_length is 256"):
        train(tmp_path, tmp_path / "told", *keys, "data.oversize=error")
