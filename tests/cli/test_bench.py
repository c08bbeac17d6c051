"""``nemo-bluelm bench``: what it measures, and its mistakes."""

import importlib.util
import json
import re

import pytest
import torch

from nemo_bluelm.bench.images import SIZES, make_images
from nemo_bluelm.bench.peers import peers
from nemo_bluelm.geometry import Geometry
from tests.conftest import one_line


@pytest.mark.slow
def test_loader_in_one_run(cli, tmp_path):
    out = tmp_path / "result.json"
    options = ("--backends", "torch,pil", "--images", "4", "--rounds", "2", "--threads", "2")
    code, text, _ = cli("bench", "loader", *options, "--json", "--out", str(out))
    report = json.loads(text)
    assert code == 0 and json.loads(out.read_text()) == report
    paths = {row["name"]: row for row in report["paths"]}
    assert {"torch", "pil", "hf slow"} <= paths.keys()
    assert ("hf fast" in paths) == (importlib.util.find_spec("torchvision") is not None)
    assert len({row["tiles"] for row in paths.values()}) == 1  # the same work for all
    for row in paths.values():
        cpu = row["cpu_ms"]
        assert 0 < cpu["min"] <= cpu["median"] <= cpu["max"] and row["images_per_s"] > 0
        assert len(row["rounds"]) == 2
    assert paths["hf slow"]["ratio"]["hf slow"] == 1
    assert paths["pil"]["parity"] == {"max": 0, "mean": 0}
    assert 0 < paths["torch"]["parity"]["mean"] <= 0.25 and paths["torch"]["parity"]["max"] <= 16
    assert report["settings"]["images"] == 4 and report["versions"]["torch"] and report["machine"]["cores"]


def test_missing_torchvision_is_told(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torchvision" else find_spec(name, *rest)
    )
    found, notes = peers(Geometry())
    assert list(found) == ["hf slow"]
    assert len(notes) == 1 and re.search(r"pip install --no-deps --target DIR torchvision==0\.\d+\.\d+,", notes[0])


def test_images_are_the_same_every_time():
    from io import BytesIO

    from PIL import Image

    images = make_images(4)
    assert images == make_images(4)
    assert [Image.open(BytesIO(data)).size for data in images] == list(SIZES)


SMALL = (
    *("model=tiny", "model.language.vocab_size=4096", "precision=fp32", "data.sequence_length=256"),
    *("data.decode.threads=1", "train.global_batch_size=2", "train.micro_batch_size=1"),
)


@pytest.mark.slow
def test_corpus_then_training_beside_the_peer(cli, cli_process, tmp_path):
    folder, out = str(tmp_path / "corpus"), tmp_path / "result.json"
    sizes = ("--lengths", "256", "--text-tokens", "4096", "--images", "4", "--vocab-size", "512")
    code, text, _ = cli("bench", "corpus", folder, *sizes)
    assert code == 0 and json.loads(text)["samples"]["images"] == 4
    options = ("--steps", "2", "--warmup", "1", "--corpus", folder, "--json", str(out), "--no-compile")
    index = f"data.index={tmp_path / 'index'}"
    done = cli_process("bench", "peers", "bench/mixed", *SMALL, index, *options, timeout=400)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    ours, peers = report["ours"], report["peers"]
    assert [row["name"].removeprefix("transformers, ") for row in peers] == [
        f"{form}, micro-batch {size}" for form in ("packed", "padded") for size in (1, 2)
    ]
    for row in (ours, *peers):
        times = row["step_seconds"]
        assert 0 < times["min"] <= times["median"] <= times["max"] and len(row["seconds"]) == 2
        assert row["tokens_per_second"] > 0 and row["tflops"] > 0 and row["mfu"] is None and row["memory"] is None
    assert sum(ours["parameters"].values()) == peers[0]["parameters"]
    assert ours["processes"] == 1 and ours["layout"]["tensor"] == 1 and ours["precision"]["dtype"] == "fp32"
    assert ours["environment"]["versions"]["megatron-core"] and 0 <= ours["data_wait"]["fraction"] < 1
    # The same packs in every form: random weights give nearly the loss of a guess, and the same steps improve it.
    assert ours["loss"]["first"] == pytest.approx(peers[0]["loss"]["first"], abs=0.5)
    assert peers[0]["loss"]["first"] == pytest.approx(peers[2]["loss"]["first"], rel=1e-5)
    assert peers[0]["loss"]["last"] == pytest.approx(peers[3]["loss"]["last"], rel=1e-3)
    best = max(peers, key=lambda row: row["tokens_per_second"])
    assert report["best"] == best["name"]
    assert report["ratio"] == pytest.approx(ours["tokens_per_second"] / best["tokens_per_second"], rel=1e-3)
    assert f"{report['ratio']:.3f} times the tokens a second of {best['name']}" in done.stdout


@pytest.mark.long
def test_training_on_two_processes_with_a_profile(cli_process, tmp_path, corpus):
    out, kernels = tmp_path / "result.json", tmp_path / "kernels.txt"
    data = (f"data.root={corpus}", f"data.index={tmp_path / 'index'}", "data.sequence_length=256")
    options = ("--steps", "2", "--warmup", "1", "--nproc", "2", "--profile", str(kernels), "--json", str(out))
    done = cli_process("bench", "train", "tiny/sft", *data, *options, timeout=400)
    assert done.returncode == 0, done.stderr
    row = json.loads(out.read_text())
    assert row["processes"] == 2 and len(row["seconds"]) == len(row["tokens"]) == 2 and len(row["losses"]) == 4
    assert kernels.read_text().startswith("wall ") and "Self CPU" in kernels.read_text()


def test_one_rank_of_several_is_refused(cli, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    code, _, stderr = cli("bench", "train", "bench/text_4k")
    assert "this process is rank 1" in one_line(code, stderr)


def test_mistake_that_the_measuring_process_finds(cli_process, tmp_path):
    done = cli_process("bench", "train", "tiny/sft", f"data.root={tmp_path}", f"data.index={tmp_path}", "--steps", "1")
    assert one_line(done.returncode, done.stderr).startswith(f"tokenizer {tmp_path}/tokenizer.json does not exist")


@pytest.mark.slow
def test_vision_beside_siglip(cli_process, tmp_path):
    out = tmp_path / "result.json"
    options = ("--tiles", "3", "--steps", "2", "--warmup", "1", "--no-compile", "--json", str(out))
    done = cli_process("bench", "vision", "model=tiny", "precision=fp32", *options)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert [row["name"] for row in report["rows"]] == ["nemo_bluelm, 3 tiles", "transformers, 3 tiles"]
    ours, theirs = report["rows"]
    assert report["ratio"] == pytest.approx(ours["tiles_per_second"] / theirs["tiles_per_second"], rel=1e-3)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), "COMMAND"),
        (("lodaer",), "lodaer"),
        (("loader", "--images", "0"), "--images"),
        (("loader", "--images", "1", "--backends", "tourch"), "did you mean torch"),
        (("loader", "--backends", " ,"), "names none"),
        (("loader", "--out", "no/such/folder/x.json"), "the folder no/such/folder does not exist"),
        pytest.param(
            ("loader", "--images", "1", "--device", "gpu"),
            "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device"),
        ),
        (("loader", "--folder", "nowhere"), "nowhere has no .jpg files"),
        (("train", "bench/text_5k"), "bench/text_5k: recipe not found; did you mean bench/text_"),
        (("train", "bench/text_4k", "--steps", "0"), "--steps"),
        (("train", "bench/text_4k", "--json", "no/such/x.json"), "there is no folder no/such"),
        (("train", "bench/text_4k", "--profile", "no/such/x.txt"), "there is no folder no/such"),
        (("train", "bench/text_4k", "parallel.tensor=3", "--nproc", "3"), "not a multiple of parallel.tensor 3"),
        (("peers", "bench/mixed", "--micro-batches", "1,x"), "'x' is not a whole number"),
        (("vision", "--tiles", "0"), "--tiles"),
        (("vision", "optim.rl=1"), "did you mean optim.lr"),
        (("corpus", "recipes"), "recipes exists and is not an empty folder"),
    ],
)
def test_mistakes(cli, argv, words):
    code, _, stderr = cli("bench", *argv)
    assert words in one_line(code, stderr)


def test_generation_beside_transformers(cli, tmp_path):
    out = tmp_path / "result.json"
    load = ("--prompts", "2", "--samples", "2", "--prompt-tokens", "24", "--new-tokens", "4", "--tiles", "1")
    code, text, _ = cli("bench", "generate", *load, "model=tiny", "precision=fp32", "--json", str(out))
    rows = json.loads(out.read_text())["rows"]
    assert code == 0 and "times the tokens a second of transformers" in text
    assert [row["name"] for row in rows] == ["nemo_bluelm", "transformers"]
    assert all(0 < row["first_token_seconds"] < row["seconds"] for row in rows)


def test_generation_needs_room_for_its_tiles(cli):
    code, _, stderr = cli("bench", "generate", "model=tiny", "--tiles", "4", "--prompt-tokens", "16")
    assert "4 tiles alone have 16" in one_line(code, stderr)
