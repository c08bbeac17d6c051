"""The corpus: complete, honest, held out, the same every time."""

import json
import re
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from nemo_bluelm.data.corpus import main, make_corpus
from nemo_bluelm.data.corpus_digits import describe
from nemo_bluelm.data.records import read_records
from nemo_bluelm.errors import UserError


def records(corpus, pattern):
    return [record for path in sorted(corpus.glob(pattern)) for record in read_records(path)]


def test_files(corpus):
    names = "digits-test digits-train-0000 digits-train-0001 digits-train-0002 digits-train-0003 long-train-0000"
    names += " needle-train-0000 photos-train-0000 photos-train-0001 prompts-train-0000"
    names += " reasoning-test reasoning-train-0000"
    names += " reasoning-train-0001 recall-train-0000 sft-train-0000 text-test text-train-0000 text-train-0001"
    names += " preferences/digits-test preferences/digits-train preferences/problems-test preferences/problems-train"
    files = {path.relative_to(corpus).as_posix() for path in corpus.rglob("*") if path.is_file()}
    assert files == {*(f"{name}.tar" for name in names.split()), "tokenizer.json"}


def test_same_every_time_but_for_the_seed(corpus, tmp_path):
    counts = make_corpus(tmp_path / "again")
    assert counts == {
        "digits-train": 2874, "photos-train": 260, "text-train": 86, "reasoning-train": 5800, "sft-train": 6000,
        "recall-train": 480, "needle-train": 1200, "long-train": 48, "prompts-train": 1988,
        "digits-test": 360, "text-test": 7, "reasoning-test": 261,
        "preferences/digits-train": 2574, "preferences/digits-test": 360,
        "preferences/problems-train": 2000, "preferences/problems-test": 161,
        "vocab_size": 2048,
    }  # fmt: skip
    for path in (path.relative_to(corpus) for path in corpus.rglob("*") if path.is_file()):
        assert (corpus / path).read_bytes() == (tmp_path / "again" / path).read_bytes(), path
    make_corpus(tmp_path / "other", seed=1)
    assert (tmp_path / "other" / "digits-test.tar").read_bytes() != (corpus / "digits-test.tar").read_bytes()


def test_prompts_have_an_answer_and_are_not_held_out(corpus):
    with tarfile.open(corpus / "prompts-train-0000.tar") as tar:
        prompts = [json.load(tar.extractfile(member)) for member in tar]
    asked = [record.messages[0]["content"] for _, record, _ in records(corpus, "reasoning-test.tar")]
    assert not {str(question) for question in asked} & {prompt["messages"][0]["content"] for prompt in prompts}
    assert all(prompt["answer"] for prompt in prompts)
    assert {prompt["difficulty"] for prompt in prompts} >= {5, 10, 15}


def test_digits_are_held_out_and_stratified(corpus):
    train, test = records(corpus, "digits-train-*.tar"), records(corpus, "digits-test.tar")
    numbers = [{int(re.search(r"\d{4}", key)[0]) for key, _, _ in split} for split in (train, test)]
    assert not numbers[0] & numbers[1] and len(numbers[0] | numbers[1]) == 1797
    answers = Counter(record.messages[-1]["content"] for _, record, _ in test)
    assert set(answers) == set("0123456789") and min(answers.values()) >= 34
    thinking = Counter("thinking" in record.messages[-1] for _, record, _ in train)
    assert thinking == {True: 1437, False: 1437}


def test_digits_tell_the_truth(corpus):
    import io

    from PIL import Image

    digits = load_digits()
    for key, record, (image,) in records(corpus, "digits-*.tar")[::37]:
        number = int(re.search(r"\d{4}", key)[0])
        pixels, digit = digits.images[number], digits.target[number]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(image))), np.round(pixels * 255 / 16).astype(np.uint8))
        reply = record.messages[-1]
        assert reply["content"] == str(digit)
        if "thinking" in reply:
            assert reply["thinking"] == f"{describe(pixels)} So the digit is {digit}."


def test_describe():
    ring = np.zeros((8, 8))
    ring[1:5, 1:5] = 16
    ring[2:4, 2:4] = 0
    ring[6:, 6:] = 2  # faint: ink, but not a stroke
    assert describe(ring) == "I see one loop, most ink top left, least ink bottom right."


def test_samples_are_short(corpus, tokenizer):
    for _, record, _ in records(corpus, "digits-train-*.tar"):
        length = len(record.encode(tokenizer, [4]).tokens)
        assert length <= (43 if "thinking" in record.messages[-1] else 18)


def test_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(UserError, match="not an empty folder"):
        make_corpus(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_failure_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nemo_bluelm.data.corpus.train_tokenizer", fail)
    with pytest.raises(UserError, match="No space left"):
        make_corpus(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path, capsys):
    assert main([str(tmp_path / "file" / "out"), "--vocab-size", "100"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: vocab_size is 100") and captured.err.count("\n") == 1
    script = Path(__file__).parents[2] / "tools" / "make_corpus.py"
    (tmp_path / "plain").write_text("")
    done = subprocess.run([sys.executable, script, tmp_path / "plain"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "not an empty folder" in done.stderr and "Traceback" not in done.stderr


def test_webdataset_reads_the_shards(corpus):
    import webdataset

    shard = corpus / "digits-test.tar"
    theirs = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    ours = list(read_records(shard))
    assert [sample["__key__"] for sample in theirs] == [key for key, _, _ in ours]
    assert [sample["0.png"] for sample in theirs] == [images[0] for _, _, images in ours]
