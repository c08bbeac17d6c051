"""``plan``: what it says is computed from the recipe and the built model."""

import json

import pytest


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
