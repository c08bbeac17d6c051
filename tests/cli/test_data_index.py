"""``data index`` and ``data quarantine``: tables, JSON for programs, one line for mistakes."""

import json
import os
import pty
import shutil
import subprocess
import sys

import pytest

from nemo_bluelm.data.index import build_index
from nemo_bluelm.data.ledger import Entry, Ledger
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.data.writer import RawSample, write_shard
from nemo_bluelm.geometry import Geometry
from tests.conftest import CHECKOUT, one_line


@pytest.fixture
def root(tmp_path, corpus):
    folder = tmp_path / "root"
    (folder / "sub").mkdir(parents=True)
    shutil.copy(corpus / "tokenizer.json", folder)
    shutil.copy(corpus / "photos-train-0000.tar", folder / "sub")
    write_shard(folder / "sub" / "text.tar", [RawSample(f"t{n}", {"text": "word " * 9}) for n in range(7)])
    write_shard(folder / "sub" / "bad.tar", [RawSample("k", {"text": ""}), RawSample("l", {"text": "word"})])
    return folder


@pytest.fixture
def index(cli, root, tmp_path):
    """``index("sub/*.tar", ...)``: the command's outcome."""

    def index(*arguments, root=root):
        return cli(
            "data", "index", *arguments, "--root", str(root), "--out", str(tmp_path / "index"), "--model", "tiny"
        )

    return index


def test_json(index, root, tmp_path):
    code, out, err = index("sub/*.tar", "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert [shard["shard"] for shard in report["shards"]] == [
        "sub/bad.tar",
        "sub/photos-train-0000.tar",
        "sub/text.tar",
    ]
    tokenizer = Tokenizer.load(root / "tokenizer.json")
    expected = build_index(["sub/*.tar"], tmp_path / "other", Geometry(tile=56), tokenizer, root=root)
    for shard in report["shards"]:
        own = expected[shard["shard"]]
        assert (
            shard["samples"] == len(own) and shard["tokens"] == own.tokens.sum() and shard["images"] == own.num_images
        )
    assert report["totals"] == {
        key: sum(s[key] for s in report["shards"]) for key in ("samples", "rejected", "images", "tokens")
    }
    assert report["totals"]["rejected"] == 1 and report["new_samples"] == report["totals"]["samples"]
    again = json.loads(index("sub/*.tar", "--json")[1])
    assert again["new_samples"] == 0 and again["shards"] == report["shards"]


def test_table(index, root):
    torn = root / "sub" / "text.tar"
    torn.write_bytes(torn.read_bytes()[:4000])
    code, out, err = index("sub/*.tar")
    assert (code, err) == (0, "")
    for words in ("sub/text.tar", "3 shards", "data quarantine list", "samples/s", "write the shard again"):
        assert words in out


def test_the_model_decides_the_tokens(cli, root, tmp_path):
    command = ["data", "index", "sub/p*.tar", "--root", str(root), "--out", str(tmp_path / "index"), "--json"]
    tokens = [json.loads(cli(*command, *model)[1])["totals"]["tokens"] for model in ([], ["--model", "tiny"])]
    assert tokens[0] > 5 * tokens[1]


def test_the_tokenizer_is_found_beside_the_first_shard(cli, root, tmp_path, monkeypatch):
    shutil.move(root / "tokenizer.json", root / "sub")
    monkeypatch.chdir(root)
    code, out, _ = cli("data", "index", "sub/text.tar", "--out", str(tmp_path / "index"), "--json")
    assert code == 0 and json.loads(out)["totals"]["samples"] == 7


def test_a_terminal_sees_a_bar(root, tmp_path):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "nemo_bluelm.cli.main", "data", "index", "sub/*.tar", "--root", str(root)]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "index")], cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=theirs
    )
    os.close(theirs)
    output, shown = process.communicate()[0].decode(), b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # Linux's end of a terminal
        pass
    os.close(ours)
    assert process.returncode == 0 and "3 shards" in output
    assert b"3/3" in shown and b"samples" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["txet*.tar"], "'txet*.tar' matches no file"),
        (["sub/*.tar", "--model", "tinny"], "did you mean tiny?"),
        (["sub/*.tar", "--workers", "0"], "--workers"),
        (["sub/*.tar", "--tokenizer", "nowhere.json"], "tokenizer nowhere.json does not exist"),
    ],
)
def test_mistakes(arguments, words, index, cli, root, tmp_path):
    command = ["data", "index", *arguments, "--root", str(root), "--out", str(tmp_path / "index")]
    code, _, err = cli(*command)
    assert words in one_line(code, err)


def test_no_tokenizer(index, root):
    (root / "tokenizer.json").unlink()
    code, _, err = index("sub/*.tar")
    assert "name one with --tokenizer" in one_line(code, err)


def test_quarantine(cli, index, tmp_path):
    folder = str(tmp_path / "index")
    index("sub/*.tar")
    Ledger(tmp_path / "index" / "quarantine.jsonl").append(Entry("sub/text.tar", "t1", 1024, "", "broken", "decode"))
    code, out, _ = cli("data", "quarantine", "list", folder, "--json")
    rows = json.loads(out)
    assert code == 0 and [(row["key"], row["stage"], row["left_out"]) for row in rows] == [
        ("k", "index", True),
        ("t1", "decode", False),
    ]
    assert "text is ''" in rows[0]["error"]
    code, out, _ = cli("data", "quarantine", "apply", folder)
    assert code == 0 and out.startswith("1 sample ") and "refuse to resume" in out
    code, out, _ = cli("data", "quarantine", "apply", folder, "--json")
    assert json.loads(out) == {"index": folder, "left_out": 1, "new": 0}
    code, out, _ = cli("data", "quarantine", "list", folder)
    assert code == 0 and "broken" in out and "sub/text.tar" in out
    code, out, _ = cli("data", "quarantine", "clear", folder)
    assert (code, out) == (0, "1 sample will be taken back in from now on.\n")
    assert [row["left_out"] for row in json.loads(cli("data", "quarantine", "list", folder, "--json")[1])] == [
        True,
        False,
    ]
    code, out, _ = cli("data", "quarantine", "clear", folder, "--json")
    assert json.loads(out) == {"index": folder, "taken_back": 0}


def test_quarantine_of_nothing(cli, index, tmp_path):
    index("sub/text.tar")
    code, out, _ = cli("data", "quarantine", "list", str(tmp_path / "index"))
    assert (code, out) == (0, f"{tmp_path / 'index'} has no bad samples.\n")


@pytest.mark.parametrize("action", ["list", "apply", "clear"])
def test_quarantine_of_no_index(action, cli, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        code, _, err = cli("data", "quarantine", action, str(folder))
        assert f"{folder} is not an index" in one_line(code, err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("action", ["list", "apply", "clear"])
def test_quarantine_of_a_broken_ledger(action, cli, index, tmp_path):
    index("sub/text.tar")
    (tmp_path / "index" / "quarantine.jsonl").mkdir()
    code, _, err = cli("data", "quarantine", action, str(tmp_path / "index"))
    assert "quarantine.jsonl can't be used" in one_line(code, err)
