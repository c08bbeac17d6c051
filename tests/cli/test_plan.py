"""``plan``: what it says is computed from the recipe and the built model."""

import json

import pytest

from tests.conftest import one_line


def _plan(done) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_tiny_plan(cli_process):
    plan = _plan(
        cli_process("plan", "tiny/sft", "--json", "--image", "56x56", "--image", "112x56", "--world-size", "2")
    )
    assert plan["config"]["optim"]["beta2"] == 0.98
    params = plan["params"]
    assert params["total"] == params["language"] + params["vision"] + params["projector"]
    assert plan["images"] == [
        {"width": 56, "height": 56, "grid": [1, 1], "tiles": 1, "tokens": 4},
        {"width": 112, "height": 56, "grid": [2, 1], "tiles": 3, "tokens": 12},
    ]
    assert plan["layout"]["data"] == 2
    assert plan["missing"] == []


@pytest.mark.slow
def test_full_scale_plan_needs_no_data(cli_process):
    plan = _plan(cli_process("plan", "recipes/sft.yaml", "--json"))
    assert plan["missing"] == ["data.root", "init_from"]
    assert plan["config"]["data"]["root"] == "???"
    assert plan["params"] == {
        "vision": 412_987_248,
        "projector": 18_364_416,
        "language": 2_458_421_760,
        "total": 2_889_773_424,
    }
    phone = next(image for image in plan["images"] if (image["width"], image["height"]) == (1080, 2400))
    assert (phone["grid"], phone["tiles"], phone["tokens"]) == ([2, 4], 9, 1764)
    assert "data" not in plan["layout"]


@pytest.mark.slow
def test_tables(cli_process):
    done = cli_process("plan", "tiny/sft", "train.freeze=[vision]", "~data.sources.text")
    assert done.returncode == 0, done.stderr
    assert all(text in done.stdout for text in ("Parameters", "Images", "Layout", "projector", "name: tiny_sft"))


def test_flops_need_no_device(cli_process):
    plan = _plan(cli_process("plan", "tiny/sft", "--json", "--tiles", "3"))
    assert plan["device"] is None
    assert plan["flops"]["tiles_per_pack"] == 3
    assert plan["flops"]["per_token"] > plan["flops"]["per_text_token"] > 0


@pytest.mark.slow
def test_a_device_and_a_proposal(cli_process):
    asked = ["plan", "recipes/sft.yaml", "parallel.context=1", "--world-size", "8", "--device", "h100", "--propose"]
    plan = _plan(cli_process(*asked, "--json"))
    device = plan["device"]
    assert not device["fits"] and device["needed_gib"] > device["device_gib"]
    assert device["nearest"] and all(override.count("=") == 1 for override in device["nearest"])
    parts = device["memory"][0]
    assert parts["total"] == pytest.approx(sum(parts[name] for name in list(parts)[:-2]))
    assert [row["gpus"] for row in device["scaling"]] == [8, 16, 32, 64, 128, 256, 512, 1024]
    assert device["proposal"]["gpu_hours"] > 0

    again = _plan(cli_process(*asked[:-1], *device["proposal"]["overrides"], "--json"))["device"]
    assert again["fits"] and again["memory"] == device["proposal"]["memory"]

    shown = cli_process(*asked)
    assert shown.returncode == 0, shown.stderr
    for text in (
        "Model FLOPs",
        "GiB on a GPU",
        "The nearest that fits: parallel.",
        "Proposed: ",
        "Scaling",
        "GPU-hours",
    ):
        assert text in shown.stdout


def test_what_is_asked_wrongly(cli):
    assert "--propose needs" in one_line(*cli("plan", "tiny/sft", "--propose")[::2])
    assert "--device is h1; it must be one of" in one_line(*cli("plan", "tiny/sft", "--device", "h1")[::2])
    told = one_line(*cli("plan", "tiny/sft", "parallel.tensor=3", "--world-size", "2", "--device", "a100")[::2])
    assert "the nearest that fits 2 x NVIDIA A100 80GB: parallel.tensor=" in told
