"""``plan``: what it says is computed from the recipe and the built model."""

import json

import pytest

from nemo_bluelm.config.compose import load_without_data, to_yaml
from nemo_bluelm.config.pipeline import load_pipeline
from nemo_bluelm.runtime.params import count_parameters
from tests.conftest import CHECKOUT, one_line

OF_7B = [f"model.language.{key}" for key in ("hidden_size=4096", "ffn_hidden_size=11008", "num_attention_heads=32")]
SFT = str(CHECKOUT / "recipes/sft.yaml")


def _plan(code: int, stdout: str, stderr: str) -> dict:
    assert code == 0, stderr
    return json.loads(stdout)


def test_tiny_plan(cli_process):
    asked = ["plan", "tiny/sft", "model.language.share_embeddings_and_output_weights=false", "--json"]
    sizes = ["train.micro_batch_size=1", "--image", "56x56", "--image", "112x56"]
    done = cli_process(*asked, *sizes, "--world-size", "2", "--device", "a100")
    plan = _plan(done.returncode, done.stdout, done.stderr)
    assert plan["config"]["optim"]["beta2"] == 0.98
    params = plan["params"]
    assert params["total"] == params["language"] + params["vision"] + params["projector"]
    assert plan["device"]["memory"][0]["weights"] == 4 * params["total"]
    assert params == count_parameters(load_without_data("tiny/sft", asked[2:3])[0].model)
    assert plan["images"] == [
        {"width": 56, "height": 56, "grid": [1, 1], "tiles": 1, "tokens": 4},
        {"width": 112, "height": 56, "grid": [2, 1], "tiles": 3, "tokens": 12},
    ]
    assert plan["layout"]["data"] == 2
    assert plan["missing"] == []


@pytest.mark.slow
def test_full_scale_plan_needs_no_data(cli):
    plan = _plan(*cli("plan", SFT, "--json"))
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
@pytest.mark.parametrize("stage", load_pipeline("pipeline", []).stages, ids=lambda stage: stage.name)
def test_every_stage_on_8_64_and_512_gpus(stage, cli, tmp_path):
    beside = []
    if stage.name == "text_pretrain":
        wide, _, _ = load_without_data(stage.recipe, OF_7B)
        (tmp_path / "recipe.yaml").write_text(to_yaml(wide))
        beside = [f"distill.teacher={tmp_path}"]
    for gpus in (8, 64, 512):
        plan = _plan(*cli("plan", stage.recipe, *beside, "--world-size", str(gpus), "--device", "h100", "--json"))
        assert (plan["device"]["memory"][0]["teacher"] > 12 * 2**30) == bool(beside)
        layout, steps = plan["layout"], plan["config"]["train"]["steps"]
        packs, length = plan["config"]["train"]["global_batch_size"], plan["config"]["data"]["sequence_length"]
        assert (layout["steps"], layout["tokens_of_the_run"]) == (steps, steps * packs * length)
        assert plan["device"]["fits"] and plan["device"]["gpu_hours"] > 0
    code, shown, _ = cli("plan", stage.recipe, "--world-size", "512", "--device", "h100")
    assert code == 0
    for text in ("tokens of the run", "steps", "GPU-hours", "needed in all"):
        assert text in shown


@pytest.mark.slow
def test_tables(cli):
    code, shown, stderr = cli("plan", "tiny/sft", "train.freeze=[vision]", "~data.sources.text")
    assert code == 0, stderr
    assert all(text in shown for text in ("Parameters", "Images", "Layout", "projector", "name: tiny_sft"))


@pytest.mark.slow
def test_flops_need_no_device(cli):
    plan = _plan(*cli("plan", "tiny/sft", "--json", "--tiles", "3"))
    assert plan["device"] is None
    assert plan["flops"]["tiles_per_pack"] == 3 and plan["flops"]["text"] is None
    assert plan["flops"]["per_token"] > plan["flops"]["per_text_token"] > 0


@pytest.mark.slow
def test_a_device_and_a_proposal(cli):
    asked = ["plan", SFT, "parallel.context=1", "--world-size", "8", "--device", "h100", "--propose"]
    plan = _plan(*cli(*asked, "--json"))
    device = plan["device"]
    assert not device["fits"] and device["needed_gib"] > device["device_gib"]
    assert device["nearest"] and all(override.count("=") == 1 for override in device["nearest"])
    parts = device["memory"][0]
    assert parts["total"] == pytest.approx(sum(parts[name] for name in list(parts)[:-3]))
    assert parts["total"] < parts["reserved"] < parts["needed"]
    assert [row["gpus"] for row in device["scaling"]] == [8, 16, 32, 64, 128, 256, 512, 1024]
    assert device["proposal"]["gpu_hours"] > 0

    again = _plan(*cli(*asked[:-1], *device["proposal"]["overrides"], "--json"))["device"]
    assert again["fits"] and again["memory"] == device["proposal"]["memory"]

    code, shown, stderr = cli(*asked)
    assert code == 0, stderr
    for text in (
        "Model FLOPs",
        "GiB on a GPU",
        "The nearest that fits: train.recompute.",
        "Proposed: ",
        "Scaling",
        "GPU-hours",
    ):
        assert text in shown


def test_a_proposal_for_a_layout_that_cannot_be(cli):
    asked = ["plan", "bench/text_4k", "parallel.tensor=3", "--world-size", "1024", "--device", "h100", "--propose"]
    plan = _plan(*cli(*asked, "--json"))
    assert "not a multiple of parallel.tensor 3" in plan["device"]["problem"]
    overrides = plan["device"]["proposal"]["overrides"]
    assert not any(override.startswith("parallel.context") for override in overrides)
    assert plan["device"]["proposal"]["text"]["step"]["mfu"] > plan["device"]["proposal"]["step"]["mfu"]
    code, shown, stderr = cli(*asked)
    assert code == 0, stderr
    for text in ("Note: ", "Proposed: parallel.tensor=1", "With the recipe's 16", "text alone", "An upper bound"):
        assert text in shown
    again = _plan(*cli(*asked[:2], *asked[3:-1], *overrides, "--json"))["device"]
    assert again["fits"] and again["step"] == plan["device"]["proposal"]["step"]


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize(
    "key",
    [
        *("parallel.tensor", "parallel.pipeline", "parallel.virtual_pipeline", "parallel.first_stage_layers"),
        *("parallel.context", "data.sequence_length", "train.micro_batch_size", "train.global_batch_size"),
    ],
)
def test_a_layout_of_nothing(cli, key, value):
    for options in ([], ["--world-size", "8", "--device", "h100", "--propose"]):
        told = one_line(*cli("plan", SFT, f"{key}={value}", *options)[::2])
        assert f"{key} is {value}; " in told


def test_a_batch_that_the_gpus_cannot_share(cli):
    asked = ["plan", "bench/text_4k", "--device", "h100", "--propose", "--world-size"]
    told = one_line(*cli(*asked, "7")[::2])
    assert "train.global_batch_size is 16, which --world-size 7 can't share" in told
    assert told.endswith("set train.global_batch_size=14")
    assert one_line(*cli(*asked, "100000")[::2]).endswith("set train.global_batch_size=100000")


def test_what_is_asked_wrongly(cli):
    told = one_line(*cli("plan", "bench/text_4k", "--tiles", "21")[::2])
    assert "--tiles is 21; a pack holds 20 at most, data.sequence_length 4096" in told
    told = one_line(*cli("plan", "bench/text_4k", "data.max_tiles=7", "--tiles", "8")[::2])
    assert "--tiles is 8; a pack holds 7 at most, data.max_tiles" in told
    assert "--world-size 2" in one_line(*cli("plan", "tiny/sft", "parallel.tensor=2", "--world-size", "1")[::2])
    assert "--propose needs" in one_line(*cli("plan", "tiny/sft", "--propose")[::2])
    assert "--device is empty; it must be one of" in one_line(*cli("plan", "tiny/sft", "--device", "")[::2])
    assert "'²' is not a whole number" in one_line(*cli("plan", "tiny/sft", "--tiles", "²")[::2])
    assert "--device is h1; it must be one of" in one_line(*cli("plan", "tiny/sft", "--device", "h1")[::2])
    told = one_line(*cli("plan", "tiny/sft", "parallel.tensor=3", "--world-size", "2", "--device", "a100")[::2])
    assert "the nearest that fits 2 x NVIDIA A100 80GB: parallel.tensor=" in told
