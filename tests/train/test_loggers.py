"""TensorBoard and Weights & Biases get what metrics.jsonl has, offline."""

import importlib.util
import json

import pytest

from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.errors import UserError
from nemo_bluelm.train.loggers import Loggers, check_loggers

ROW = {"loss": 2.5, "tokens_by_source": {"text": 7}, "mfu": None}


def recipe(*overrides):
    return load_recipe("tiny/sft", list(overrides))


def test_tensorboard_and_a_resumed_run_replaces_what_came_later(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    asked = recipe("log.tensorboard=true")
    for start, steps in ((0, (1, 2, 3)), (1, (2, 3, 4))):
        loggers = Loggers(asked, tmp_path, start)
        for step in steps:
            loggers.write({"step": step, **ROW, "loss": 10 * start + step})
        loggers.close()
    seen = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    seen.Reload()
    assert [(event.step, event.value) for event in seen.Scalars("loss")] == [(1, 1.0), (2, 12.0), (3, 13.0), (4, 14.0)]
    assert seen.Scalars("tokens_by_source/text")[0].value == 7


def test_wandb_stays_on_this_machine(tmp_path):
    pytest.importorskip("wandb", reason="needs wandb")
    loggers = Loggers(recipe("log.wandb.mode=offline", "log.wandb.project=probe"), tmp_path, 0)
    loggers.write({"step": 1, **ROW})
    assert loggers._wandb.settings.mode == "offline" and loggers._wandb.project == "probe"
    loggers.close()
    (kept,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert kept.stat().st_size > 0


def test_nothing_is_asked_for_by_default(tmp_path):
    loggers = Loggers(recipe(), tmp_path, 0)
    loggers.write({"step": 1, **ROW})
    loggers.close()
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("tensorboard", "wandb") else found(name)
    )
    for override, package in (("log.tensorboard=true", "tensorboard"), ("log.wandb.mode=offline", "wandb")):
        with pytest.raises(UserError, match=f"{package} isn't installed; pip install {package}, or set log."):
            check_loggers(recipe(override).log)


def test_online_needs_a_key(monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(type(wandb.api), "api_key", None, raising=False)
    with pytest.raises(UserError, match="WANDB_API_KEY isn't set"):
        Loggers(recipe("log.wandb.mode=online"), tmp_path, 0)


@pytest.mark.slow
def test_a_run_fills_them(corpus, tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tests.runtime.processes import TRAIN, run

    settings = [f"data.root={corpus}", f"run_dir={tmp_path}", "train.steps=2", "train.global_batch_size=1"]
    run(*TRAIN, "tiny/sft", *settings, "optim.warmup_steps=1", "log.tensorboard=true")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert list((tmp_path / "tensorboard").glob("events.*")) and json.loads((tmp_path / "environment.json").read_text())
