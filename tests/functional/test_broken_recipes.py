"""Mistakes a user makes, through the real command line: one line with the way out, exit code 2, nothing left behind."""

import io
import json
import tarfile

import pytest

from tests.conftest import one_line


@pytest.fixture(scope="module")
def shards(corpus, tmp_path_factory):
    """A data.root with good shards and, beside them, one shard of every kind of damage."""
    root = tmp_path_factory.mktemp("damaged")
    for file in corpus.iterdir():
        (root / file.name).symlink_to(file)
    good = (corpus / "digits-train-0000.tar").read_bytes()
    (root / "cut.tar").write_bytes(good[:700])
    (root / "prose.tar").write_text("this is not a tar file\n" * 100)
    write_tar(root / "empty.tar", {})
    write_tar(root / "not_image.tar", {"a.json": question("0.png"), "a.0.png": b"<html>404 Not Found</html>"})
    write_tar(root / "lost_image.tar", {"a.json": question("0.png")})
    write_tar(root / "bad_json.tar", {"a.json": b"{messages: ]"})
    write_tar(root / "long.tar", {"a.json": conversation("word " * 3000)})
    return root


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def question(image):
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "1"}]
    return json.dumps({"messages": messages, "images": [image]}).encode()


def conversation(query):
    return json.dumps(
        {"messages": [{"role": "user", "content": query}, {"role": "assistant", "content": "yes"}]}
    ).encode()


DIGITS = "data.sources.digits.shards"

# What the user types -> what the one line must hold: the thing, and the way out.
MISTAKES = {
    "recipe that does not exist": (["recipes/tiny/sfft.yaml"], ["recipes/tiny/sfft.yaml", "tiny/sft"]),
    "unknown key": (["tiny/sft", "optim.lrr=1"], ["optim.lrr", "did you mean optim.lr?"]),
    "wrong type": (["tiny/sft", "train.steps=many"], ["train.steps", "many"]),
    "value out of range": (["tiny/sft", "optim.lr=-1"], ["optim.lr", "-1"]),
    "unknown block": (["tiny/sft", "model=huge"], ["huge", "tiny"]),
    "bad choice": (["tiny/sft", "optim.schedule=linear"], ["optim.schedule", "linear", "cosine"]),
    "bad override syntax": (["tiny/sft", "optim.lr"], ["optim.lr"]),
    "missing mandatory key": (["sft"], ["data.root"]),
    "heads over tensor ranks": (["tiny/sft", "parallel.tensor=3", "--nproc", "3"], ["parallel.tensor", "3"]),
    "layers over pipeline ranks": (
        ["tiny/sft", "parallel.pipeline=3", "--nproc", "3"],
        ["model.language.num_layers", "3 pipeline stages"],
    ),
    "world too small": (["tiny/sft", "parallel.tensor=2"], ["tensor 2", "--nproc 2"]),
    "batch over data ranks": (
        ["tiny/sft", "train.global_batch_size=3", "--nproc", "2"],
        ["train.global_batch_size", "3"],
    ),
    "context beyond RoPE": (["tiny/sft", "data.sequence_length=8192"], ["data.sequence_length", "8192", "yarn"]),
    "folder without data": (["tiny/sft", "data.root=/no/such/folder"], ["data.root", "/no/such/folder"]),
    "pattern without shards": (
        ["tiny/sft", f"{DIGITS}=[none-*.tar]"],
        ["data.sources.digits.shards", "none-*.tar"],
    ),
    "shard that is cut": (["tiny/sft", f"{DIGITS}=[cut.tar]"], ["cut.tar"]),
    "shard that is no tar": (["tiny/sft", f"{DIGITS}=[prose.tar]"], ["prose.tar"]),
    "dataset that is empty": (["tiny/sft", f"{DIGITS}=[empty.tar]"], ["data.sources.digits", "no samples"]),
    "image that is no image": (
        ["tiny/sft", f"{DIGITS}=[not_image.tar]"],
        ["not_image.tar", "'a'", "0.png", "not an image"],
    ),
    "image that is missing": (["tiny/sft", f"{DIGITS}=[lost_image.tar]"], ["lost_image.tar", "a.0.png"]),
    "sample that is no JSON": (["tiny/sft", f"{DIGITS}=[bad_json.tar]"], ["bad_json.tar", "'a'"]),
    "sample that is too long": (["tiny/sft", f"{DIGITS}=[long.tar]"], ["long.tar", "data.sequence_length"]),
    "tokenizer that is missing": (["tiny/sft", "data.tokenizer=nope.json"], ["nope.json"]),
    "tokenizer too large": (["tiny/sft", "model.language.vocab_size=512"], ["model.language.vocab_size", "512"]),
    "folder that can't be written": (["tiny/sft", "run_dir=/proc/nope/run"], ["run_dir", "/proc/nope/run"]),
    "start from nothing": (["tiny/sft", "init_from=/no/such/run"], ["init_from", "/no/such/run"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_shows_the_way_out(mistake, shards, tmp_path, cli_process):
    arguments, expected = MISTAKES[mistake]
    given = {argument.partition("=")[0] for argument in arguments}
    defaults = {"data.root": shards, "run_dir": tmp_path / "run"}
    overrides = [f"{key}={value}" for key, value in defaults.items() if key not in given and arguments[0] != "sft"]

    result = cli_process("train", *arguments, *overrides)

    line = one_line(result.returncode, result.stderr)
    assert [part for part in expected if part not in line] == [], line
    assert result.stdout == ""
    assert not (tmp_path / "run").exists(), "a refused run leaves nothing behind"
