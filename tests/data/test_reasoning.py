"""Synthetic reasoning: what questions, thoughts and answers say is true; modes, truncation, shards."""

import io
import re
from random import Random

import numpy as np
import pytest
from PIL import Image

from nemo_bluelm.data.make_reasoning import main, make_reasoning
from nemo_bluelm.data.reasoning import MODES, reasoning_samples, shortened, text_problem
from nemo_bluelm.data.reasoning_images import image_problems
from nemo_bluelm.data.records import read_records
from nemo_bluelm.errors import UserError


def solve(question: str) -> str:
    """The answer, by other means than the generator's."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if question.startswith("What is"):
        return str(eval(question.removeprefix("What is ").removesuffix("?")))
    if question.startswith("Which is larger"):
        return str(max(numbers))
    if question.startswith("Sort"):
        return " ".join(map(str, sorted(numbers)))
    if letters := re.fullmatch(r"How many times is (.) in (\w+)\?", question):
        return str(letters[2].count(letters[1]))
    if "together" in question:
        return str(2 * numbers[0] + numbers[1])
    return str(numbers[0] - numbers[1] + numbers[2])


@pytest.mark.parametrize("largest", [9, 99])
def test_text_problems_are_right(largest):
    rng, kinds, told = Random(0), set(), set()
    for _ in range(1000):
        problem = text_problem(rng, largest)
        kinds.add(problem.kind)
        if problem.kind not in ("comparison", "counting"):
            told |= {int(n) for n in re.findall(r"\d+", f"{problem.question} {problem.thought}")}
        assert problem.answer == solve(problem.question), problem
        for left, right in re.findall(r"(\d+ [+-] \d+) = (\d+)", problem.thought):
            assert eval(left) == int(right), problem
    assert len(kinds) == 5 and told <= set(range(largest + 1)) and max(told) == largest


def test_image_problems_are_right():
    make, rng, asked = image_problems(0, "test", rows=2), Random(0), set()
    for _ in range(80):
        problem = make(rng)
        rows = re.findall(r"Row \d: ([\d ]+)\.", problem.thought)
        digits = [int(d) for row in rows for d in row.split()]
        truth = {
            "What is the sum of the digits?": sum(digits),
            "Which digit is the largest?": max(digits),
            "How many digits are larger than 4?": sum(d > 4 for d in digits),
            "Read the digits row by row.": " ".join(map(str, digits)),
        }
        asked.add(problem.question)
        assert problem.answer == str(truth[problem.question]) and len(digits) == 4
        assert np.asarray(Image.open(io.BytesIO(problem.image))).shape == (16, 16)
    assert len(asked) == 4
    with pytest.raises(UserError, match="train or test"):
        image_problems(0, "dev")


def test_a_grid_shows_the_digits_it_tells():
    from sklearn.datasets import load_digits

    digits = load_digits()
    label = {np.round(i * 255 / 16).astype(np.uint8).tobytes(): str(t) for i, t in zip(digits.images, digits.target)}
    problem = image_problems(0, "train", rows=3)(Random(1))
    pixels = np.asarray(Image.open(io.BytesIO(problem.image)))
    tiles = pixels.reshape(3, 8, 3, 8).swapaxes(1, 2).reshape(9, 8, 8)
    seen = " ".join(re.findall(r"Row \d: ([\d ]+)\.", problem.thought))
    assert " ".join(label[np.ascontiguousarray(tile).tobytes()] for tile in tiles) == seen


def test_every_question_comes_in_every_mode():
    samples = list(reasoning_samples(text_problem, 40, MODES, "s", ("sft",)))
    assert len(samples) == 120 and len({sample.key for sample in samples}) == 120
    for direct, think, short in zip(*(samples[i::3] for i in range(3))):
        assert direct.record["messages"][0] == think.record["messages"][0] == short.record["messages"][0]
        whole, cut = (sample.record["messages"][1]["thinking"] for sample in (think, short))
        assert "thinking" not in direct.record["messages"][1]
        assert whole.startswith(cut) and cut != whole
    assert samples == list(reasoning_samples(text_problem, 40, MODES, "s", ("sft",)))


def test_a_thought_of_one_word_stays():
    assert shortened("yes", Random(0)) == "yes"


def test_shards(tmp_path, capsys):
    assert make_reasoning(tmp_path / "out", 12, 5, ("direct", "think")) == {"text": 24, "image": 10}
    read = {path.name: list(read_records(path)) for path in sorted((tmp_path / "out").glob("*.tar"))}
    assert {name: len(records) for name, records in read.items()} == {
        "reasoning-image-00000.tar": 10,
        "reasoning-text-00000.tar": 24,
    }
    assert make_reasoning(tmp_path / "again", 12, 5, ("direct", "think"))
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert main([str(tmp_path / "out")]) == 2 and "not an empty folder" in capsys.readouterr().err
    assert main([str(tmp_path / "new"), "--modes", "loud"]) == 2 and "direct, think, short" in capsys.readouterr().err
    assert main([str(tmp_path / "new"), "--text", "0", "--image", "0"]) == 2
    assert not (tmp_path / "new").exists()
