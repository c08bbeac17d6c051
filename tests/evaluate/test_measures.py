"""Measures find their options, count what they say, and tell a mistake before anything is trained."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.data.records import Record, read_records
from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate.activation import PROMPTS, activation
from nemo_bluelm.evaluate.learning import entropies, tokens_seen, tokens_to
from nemo_bluelm.evaluate.measures import Run, make_measures
from nemo_bluelm.generate.generator import Generator
from nemo_bluelm.generate.request import Reply


def write_metrics(run_dir: Path, losses: list[float], **more) -> Path:
    run_dir.mkdir()
    rows = [
        {"step": step, "loss": loss, "tokens": 100} | {key: values[step - 1] for key, values in more.items()}
        for step, loss in enumerate(losses, 1)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_dir


def test_tokens_to_a_loss(tmp_path):
    run = write_metrics(tmp_path / "run", [float(loss) for loss in range(30, 0, -1)])
    assert entropies(run)[:2] == [30.0, 29.5] and entropies(run)[-1] == sum(range(1, 11)) / 10
    assert tokens_seen(run)[:2] == [100, 200]
    assert tokens_to(run, 15.5) == 2000  # the mean of 20 to 11
    assert tokens_to(run, 5.4) is None


def test_the_teachers_part_of_a_loss_does_not_count(tmp_path):
    run = write_metrics(tmp_path / "run", [9.0, 9.0], cross_entropy=[4.0, 2.0])
    assert entropies(run) == [4.0, 3.0]


def test_learning_is_measured_against_a_reference(tmp_path):
    fast, slow = (
        write_metrics(tmp_path / "fast", [6.0, 3.0, 1.0, 0.0]),
        write_metrics(tmp_path / "slow", [6.0, 5.0, 4.0, 3.0]),
    )
    (measure,) = make_measures({"learning": {"reference": "slow"}}, "x")
    folders = {"fast": fast, "slow": slow}
    numbers = [measure.measure(Run(None, folder, None, folders)).numbers for folder in (fast, slow)]
    assert [[number.value for number in row] for row in numbers] == [[2.5, 200], [4.5, 400]]


def test_rewards_are_those_of_the_runs_end_and_a_curve(tmp_path):
    run = write_metrics(tmp_path / "run", [0.0] * 3, **{"reward/mean": [0.0, 0.5, 1.0]})
    (measure,) = make_measures({"rewards": {}}, "x")
    found = measure.measure(Run(None, run, None, {}))
    assert [number.value for number in found.numbers] == [0.5]
    assert found.curve == ((1, 0.0), (2, 0.25), (3, 0.5))
    with pytest.raises(UserError, match="objective is next_token; only grpo has rewards"):
        measure.check(Run(load_recipe("tiny/sft", []), run, None, {}))


def test_the_packaged_prompts():
    """36 of each kind, half of them with one right answer, which is a number or several."""
    prompts = [record for _, record, _ in read_records(PROMPTS)]
    assert Counter(prompt.tags for prompt in prompts) == {
        (kind, how): 18 for kind in ("business", "technical", "creative") for how in ("exact", "open")
    }
    questions = [prompt.messages[0]["content"] for prompt in prompts]
    assert len(set(questions)) == len(questions) == len({prompt.id for prompt in prompts}) == 108
    for prompt in prompts:
        answer = prompt.messages[1]["content"]
        assert (prompt.tags[1] == "open") or all(word.isdigit() for word in answer.split()), prompt.id


def test_activation_counts_thoughts_answers_and_likelihood(corpus, world):
    from nemo_bluelm.config.schema import ParallelConfig, geometry_of
    from nemo_bluelm.data.tokenizer import Tokenizer
    from nemo_bluelm.model.bluelm import BlueLMModel
    from nemo_bluelm.model.config import language_transformer_config
    from nemo_bluelm.model.init import initialize

    class Scripted(Generator):
        """A real model whose replies are prescribed: it thinks about all but stories, and asked or not."""

        def generate(self, prompts, max_new_tokens):
            return [self._reply(prompt) for prompt in prompts]

        def _reply(self, prompt):
            text = prompt.messages[-1]["content"]
            return Reply("hm" if "story" not in text else None, text.split()[-1], True)

    recipe = load_recipe("tiny/sft", [])
    tokenizer = Tokenizer.load(corpus / "tokenizer.json")
    config = language_transformer_config(recipe.model.language, ParallelConfig(), recipe.precision)
    model = BlueLMModel(config, recipe.model, tokenizer.image, 512).eval()
    initialize(model, recipe.model.language, seed=0)
    generator = Scripted(model, tokenizer, geometry_of(recipe.model))

    def prompt(question, answer, *tags):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return Record(messages=messages, tags=tags)

    prompts = [
        prompt("Say 7", "7", "plain", "exact"),
        prompt("Say 8", "9", "plain", "exact"),
        prompt("Tell a story", "Once", "tale", "open"),
        prompt("Tell it", "Once upon a time", "tale", "open"),
    ]
    found = activation(generator, prompts, prompts_at_once=3)
    assert {kind: (of.activated, of.unasked, of.right, of.count) for kind, of in found.items()} == {
        "plain": (1.0, 1.0, 0.5, 2),
        "tale": (0.5, 0.5, None, 2),
    }

    def likelihood(question, answer, thought):
        t = tokenizer
        start = [t.bos, t.human, *t.encode(question), t.blue_think, *t.newline, t.ai]
        start += [t.think, *t.encode(thought), t.think_end] if thought else []
        targets = [*t.encode(answer), t.eos]
        tokens = torch.tensor([start + targets])
        with torch.no_grad():
            logits = model_logits(model, tokens, t)
        logs = logits.double().log_softmax(-1)
        return sum(float(logs[len(start) + i - 1, token]) for i, token in enumerate(targets)), len(targets)

    parts = [likelihood("Tell a story", "Once", None), likelihood("Tell it", "Once upon a time", "hm")]
    expected = sum(part[0] for part in parts) / sum(part[1] for part in parts)
    assert found["tale"].likelihood == pytest.approx(expected, rel=1e-5)


def model_logits(model, tokens, tokenizer):
    """[tokens, vocabulary] logits of one document alone."""
    from nemo_bluelm.data.chat import Encoded
    from nemo_bluelm.data.packs import collate

    row = tokens[0].tolist()
    document = Encoded(row, [False] * len(row))
    return model(collate([document], torch.empty(0, 3, 56, 56, dtype=torch.uint8), len(row), 1, tokenizer.pad))[0]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"needles": {}}, "file: measures: unknown key needles; did you mean needle"),
        ({"needle": {"length": 3}}, "measure needle: unknown key length; did you mean lengths"),
        ({"needle": {"count": "many"}}, "measure needle: .*many"),
        ({"needle": [3]}, "measure needle: needle is a mapping"),
    ],
)
def test_a_mistake_in_the_options(entries, message):
    with pytest.raises(UserError, match=message):
        make_measures(entries, "file")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"text_loss": {"shards": ["none-*.tar"]}}, "none-.*matches no file"),
        ({"text_loss": {"length": 0}}, "length is 0; it must be 1 or more"),
        ({"needle": {"lengths": [512, 10]}}, "lengths is .*48 tokens or more"),
        ({"needle": {"depths": [2.0]}}, "depths is .*from 0 to 1"),
        ({"text_loss": {"shards": ["digits-test.tar"]}}, "digits-test.tar has no plain text"),
        ({"position_loss": {"length": 8, "spans": 9}}, "spans is 9; it must be from 1 to length 8"),
        ({"questions": {"shards": ["text-test.tar"]}}, "text-test.tar has no conversation"),
        ({"control": {"shards": ["digits-test.tar"]}}, "every question in digits-test.tar is about an image"),
        ({"learning": {"reference": "other"}}, "reference is other; it must be one of me"),
        ({"activation": {"shards": ["digits-test.tar"]}}, "prompt 1 of digits-test.tar is no conversation in text"),
    ],
)
def test_a_mistake_is_told_before_training(entries, message, corpus):
    run = Run(load_recipe("tiny/sft", [f"data.root={corpus}"]), Path("me"), None, {"me": Path("me")})
    with pytest.raises(UserError, match=message):
        make_measures(entries, "file")[0].check(run)


def test_what_is_there_passes(corpus):
    run = Run(load_recipe("tiny/sft", [f"data.root={corpus}"]), Path("me"), None, {"me": Path("me")})
    names = ("text_loss", "position_loss", "questions", "control", "activation", "needle", "learning")
    for measure in make_measures(dict.fromkeys(names), "file"):
        measure.check(run)
