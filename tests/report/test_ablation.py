"""An ablation's table and plot show its numbers; a run of one trains, measures, and keeps what it has."""

import io
import json
import os
from dataclasses import dataclass
from typing import ClassVar

import pytest
from PIL import Image

from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.evaluate.measures import CHANGE, NATS, SHARE, TOKENS, Measure, Measured, Number, Run, make_measures
from nemo_bluelm.report import ablation
from nemo_bluelm.report.ablation_plot import plot
from nemo_bluelm.report.ablation_table import console_table, markdown
from nemo_bluelm.runtime.run_dir import checkpoint_path
from tests.conftest import one_line

LABELS = ["much", "little"]
ROWS = [
    ("right", SHARE, [0.5, None]),
    ("change", CHANGE, [0.0213, -0.004]),
    ("loss", NATS, [1.23456, 2]),
    ("tokens", TOKENS, [1234567.0, 10]),
]


def test_a_number_is_shown_as_it_is_meant():
    assert markdown(LABELS, ROWS) == (
        "|  | much | little |\n"
        "| --- | ---: | ---: |\n"
        "| right | 50.0% | - |\n"
        "| change | +2.1% | -0.4% |\n"
        "| loss (nats) | 1.235 | 2.000 |\n"
        "| tokens | 1,234,567 | 10 |\n"
    )
    table = console_table(LABELS, ROWS)
    assert [str(column.header) for column in table.columns] == ["", "much", "little"]
    assert list(table.columns[1].cells) == ["50.0%", "+2.1%", "1.235", "1,234,567"]


def pixels(found: list[dict[str, Measured]]) -> bytes:
    measures = make_measures(dict.fromkeys(["text_loss", "needle", "questions"]), "x")
    image = Image.open(io.BytesIO(plot(LABELS, measures, found)))
    assert image.format == "PNG" and min(image.size) > 300
    return image.convert("RGB").tobytes()


def test_the_plot_shows_each_number():
    """A picture changes with every number that it is made of, and with nothing else."""

    def found(change=0.02, share=0.5, curve=((512, 1.0), (1024, 0.25))):
        right = (Number("right", share, SHARE),)
        return [
            {
                "text_loss": Measured((), (Number("change", change, CHANGE),)),
                "needle": Measured((), curve=curve),
                "questions": Measured(right, right),
            },
            {"text_loss": Measured(()), "needle": Measured(()), "questions": Measured(right, right)},
        ]

    before = pixels(found())
    assert before == pixels(found())
    changed = [found(change=-0.02), found(share=0.6), found(curve=((512, 1.0), (1024, 0.5)))]
    assert all(before != pixels(other) for other in changed)


ABLATION = """
name: rates
common:
  recipe: tiny/sft
  overrides:
    [train.steps=3, train.save_every=3, train.global_batch_size=1, train.micro_batch_size=1, optim.warmup_steps=1]
variants:
  low: {overrides: [optim.lr=1e-5]}
  high: {label: a high rate, overrides: [optim.lr=1e-2]}
measures:
  learning: {reference: low}
  text_loss: {}
"""


@dataclass
class Counted(Measure):
    """Counts how often it is asked."""

    name, title = "counted", "Counted"
    wanted: int = 1
    asked: ClassVar[int] = 0

    def measure(self, run):
        Counted.asked += 1
        return Measured((Number("asked", float(Counted.asked), SHARE),), curve=((1.0, 2.0),))


def test_a_measure_is_kept_as_long_as_run_and_options_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(Counted, "asked", 0)
    checkpoint = checkpoint_path(tmp_path / "run", 3)
    for name in ("weights", "recipe.yaml", "tokenizer.json"):
        (checkpoint / name).mkdir(parents=True)
    run, file = Run(load_recipe("tiny/sft", []), tmp_path / "run", None, {}), tmp_path / "measures" / "run.json"

    first = ablation.measured(Counted(), run, file)
    assert first == ablation.measured(Counted(), run, file) and Counted.asked == 1
    assert first == Measured((Number("asked", 1.0, SHARE),), curve=((1.0, 2.0),))
    ablation.measured(Counted(wanted=2), run, file)
    assert Counted.asked == 2
    os.utime(checkpoint, ns=(1, 1))  # made again
    ablation.measured(Counted(wanted=2), run, file)
    assert Counted.asked == 3


@pytest.fixture
def ablate(corpus, tmp_path, cli, recipe_file):
    path, out = recipe_file(text=ABLATION, name="rates.yaml"), tmp_path / "out"

    def run(*more: str):
        data = [f"data.root={corpus}", f"data.index={tmp_path / 'index'}"]
        return cli("ablate", path, *data, "--out", str(out), *more)

    return run, out


@pytest.mark.long
def test_a_run_from_training_to_plot_and_again(ablate, monkeypatch):
    run, out = ablate
    code, shown, error = run()
    assert code == 0, error
    table = json.loads((out / "table.json").read_text())
    assert table["ablation"] == "rates" and list(table["variants"]) == ["low", "high"]
    high = table["variants"]["high"]
    assert high["label"] == "a high rate" and "optim.lr=1e-2" in high["overrides"]
    low_loss, high_loss = (of["measures"]["text_loss"]["numbers"][0]["value"] for of in table["variants"].values())
    assert 5 < high_loss < low_loss < 9
    lines = (out / "table.md").read_text().splitlines()
    assert lines[0] == "|  | low | a high rate |"
    assert f"| loss on held-out text (nats) | {low_loss:.3f} | {high_loss:.3f} |" in lines
    assert f"{high_loss:.3f}" in shown
    assert Image.open(out / "plot.png").format == "PNG"

    # Again, with the measures of one run gone: the runs and the other's measures are kept.
    files = {name: (out / "measures" / f"{name}.json") for name in ("low", "high")}
    before, times = (out / "table.md").read_text(), files["high"].stat().st_mtime_ns
    files["low"].unlink()
    code, _, error = run()
    assert code == 0 and error.count("complete in") == 2
    assert (out / "table.md").read_text() == before
    assert files["low"].exists() and files["high"].stat().st_mtime_ns == times


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("high.optim.lrr=1", ["stage high", "did you mean optim.lr?"]),
        ("high.optim.lr=-1", ["stage high", "optim.lr is -1"]),
        ("high.data.root=/no/such/folder", ["measure text_loss of high", "/no/such/folder"]),
    ],
)
def test_a_mistake_is_told_before_anything_is_trained(override, expected, ablate):
    run, out = ablate
    code, _, error = run(override)
    line = one_line(code, error)
    assert [part for part in expected if part not in line] == [], line
    assert not out.exists()


def test_without_a_name_the_names_are_told(cli):
    code, _, error = cli("ablate")
    assert "which ablation? There are control_token, distill_weight, grpo_negatives, hybrid_rewards," in one_line(
        code, error
    )


def test_a_mistyped_name(cli):
    code, _, error = cli("ablate", "text_ration")
    assert "did you mean ablations/text_ratio?" in one_line(code, error)
