"""An evaluation run: what it counts, that it goes on where it was cut off, and that nothing in the data stops it."""

import json
from dataclasses import replace

import pytest

from nemo_bluelm.data.records import Record
from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate import run
from nemo_bluelm.evaluate.budgets import Result, accuracy_by_budget, summarize, wilson
from nemo_bluelm.evaluate.modes import ThinkMode, batches, think_modes
from nemo_bluelm.evaluate.run import run_task
from nemo_bluelm.evaluate.tasks import load_task
from nemo_bluelm.generate.generator import open_generator
from nemo_bluelm.generate.request import Prompt, Sampling
from tests.evaluate.test_tasks import picture, task_file
from tests.tiny_checkpoint import tiny_checkpoint  # noqa: F401

MODES = think_modes(True, True, [0, 3])
NEW = 12
WORDS = ("seven", "nine", "a number", "a word", "the picture", "describe", "please", "what is it")


@pytest.fixture(scope="module")
def generator(tiny_checkpoint):  # noqa: F811
    with open_generator(tiny_checkpoint) as generator:
        yield generator


@pytest.fixture(scope="module")
def said(generator):
    """What the model answers to each question without thinking."""
    prompts = [Prompt([{"role": "user", "content": words}]) for words in WORDS]
    return [reply.answer for reply in generator.generate(prompts, Sampling(NEW))]


@pytest.fixture
def data(tmp_path, said):
    """Every other reference is what the model says."""
    records = [
        {"question": words, "answer": answer if number % 2 else "never said"}
        for number, (words, answer) in enumerate(zip(WORDS, said))
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def evaluate(generator, checkpoint, folder, data, modes=MODES, overrides=(), limit=None, told=None, **content):
    task = load_task(task_file(folder, **{"max_new_tokens": NEW, **content}), list(overrides))
    tell = (told if told is not None else []).append
    return run_task(generator, task, [str(data)], modes, folder / "out", checkpoint, limit, 400, tell)


def lines(folder):
    return [json.loads(line) for line in (folder / "out" / "probe.jsonl").read_text().splitlines()[1:]]


def test_rows_count_what_was_said(generator, tiny_checkpoint, tmp_path, data):  # noqa: F811
    outcome = evaluate(generator, tiny_checkpoint, tmp_path, data)
    direct, none, three = outcome.rows
    assert (direct.think, direct.accuracy, direct.problems, direct.thinking_tokens) == (False, 0.5, 8, 0)
    assert (none.budget, none.most_thinking_tokens) == (0, 0)
    assert three.budget == 3 and 0 < three.thinking_tokens <= three.most_thinking_tokens <= 3
    assert (direct.low, direct.high) == wilson(0.5, 8) and outcome.skipped == [] and outcome.reasons == {}
    written = lines(tmp_path)
    assert len(written) == 24 and all((line["thought"] is not None) == line["think"] for line in written)
    assert sum(line["score"] for line in written if not line["think"]) == 4


class Cut(Exception):
    pass


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cut_off_anywhere_it_ends_as_if_it_had_not_been(generator, tiny_checkpoint, tmp_path, data, temperature):  # noqa: F811
    """After two batches, and then in the middle of a line."""
    overrides = [f"sampling.temperature={temperature}", "sampling.samples=2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    expected = evaluate(generator, tiny_checkpoint, whole, data, overrides=overrides)
    calls = []

    def ends_after_two(prompts, sampling):
        calls.append(len(prompts))
        if len(calls) > 2:
            raise Cut
        return type(generator).generate(generator, prompts, sampling)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "generate", ends_after_two, raising=False)
        with pytest.raises(Cut):
            evaluate(generator, tiny_checkpoint, cut, data, overrides=overrides)
    file = cut / "out" / "probe.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    kept = len(file.read_text().splitlines()) - 2  # but for the settings and the line that is torn
    assert 0 < kept < len(lines(whole))
    found = evaluate(generator, tiny_checkpoint, cut, data, overrides=overrides)
    assert found == expected
    key = json.JSONEncoder(sort_keys=True).encode
    assert sorted(map(key, lines(cut))) == sorted(map(key, lines(whole)))


def test_what_is_done_is_not_asked_again(generator, tiny_checkpoint, tmp_path, data, monkeypatch):  # noqa: F811
    first = evaluate(generator, tiny_checkpoint, tmp_path, data, limit=4)
    assert first.rows[0].problems == 4
    every = evaluate(generator, tiny_checkpoint, tmp_path, data)
    assert every.rows[0].problems == 8
    monkeypatch.setattr(generator, "generate", None, raising=False)
    assert evaluate(generator, tiny_checkpoint, tmp_path, data) == every
    assert evaluate(generator, tiny_checkpoint, tmp_path, data, limit=4) == first


@pytest.mark.parametrize(
    "overrides, name",
    [
        (["max_new_tokens=13"], "max_new_tokens"),
        (["sampling.temperature=1"], "sampling"),
        (["prompt=again"], "prompt"),
        (["scorers.exact.case=true"], "scorers"),
    ],
)
def test_results_of_other_settings_are_refused(generator, tiny_checkpoint, tmp_path, data, overrides, name):  # noqa: F811
    evaluate(generator, tiny_checkpoint, tmp_path, data, modes=MODES[:1])
    with pytest.raises(UserError, match=f"probe.jsonl has results of another {name}"):
        evaluate(generator, tiny_checkpoint, tmp_path, data, modes=MODES[:1], overrides=overrides)


def test_a_broken_file_of_results_is_refused(generator, tiny_checkpoint, tmp_path, data):  # noqa: F811
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "probe.jsonl").write_text("something else\n")
    with pytest.raises(UserError, match="line 1 is no result"):
        evaluate(generator, tiny_checkpoint, tmp_path, data)


def test_bad_records_and_images_are_named_and_the_rest_is_answered(generator, tiny_checkpoint, tmp_path):  # noqa: F811
    (tmp_path / "good.png").write_bytes(picture())
    (tmp_path / "bad.png").write_bytes(picture()[:60])
    records = [{"question": "a", "answer": "b", "images": [image]} for image in ("good.png", "bad.png", "none.png")]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "data.jsonl").write_text(text + "{\n" + json.dumps({"question": "c", "answer": "d"}) + "\n")
    told = []
    outcome = evaluate(generator, tiny_checkpoint, tmp_path, tmp_path / "data.jsonl", told=told)
    assert [row.problems for row in outcome.rows] == [2, 2, 2]
    assert sorted(skipped.where.rpartition(" ")[2] for skipped in outcome.skipped) == ["2", "3", "4"]
    for skipped in outcome.skipped:
        assert f"skipped {skipped.where}: {skipped.reason}" in told


def test_nothing_that_can_be_asked(generator, tiny_checkpoint, tmp_path):  # noqa: F811
    (tmp_path / "data.jsonl").write_text("{\n")
    with pytest.raises(UserError, match="no problem .* can be asked: .*line 1: the JSON is invalid"):
        evaluate(generator, tiny_checkpoint, tmp_path, tmp_path / "data.jsonl")


def test_unscored_is_told_and_scored_later(generator, tiny_checkpoint, tmp_path, data, monkeypatch):  # noqa: F811
    """A judge that nobody reaches leaves every answer unscored; once it is back it is asked about the same answers."""
    from nemo_bluelm.evaluate.scorers.judge import Judge

    judge = {"base_url": "http://127.0.0.1:1/v1", "model": "judge", "retries": 0}
    one = dict(modes=MODES[:1], scorers={"judge": judge})
    outcome = evaluate(generator, tiny_checkpoint, tmp_path, data, **one)
    (row,) = outcome.rows
    assert (row.accuracy, row.problems, row.unscored) == (None, 0, 8)
    assert sum(outcome.reasons.values()) == 8 and all("judge at http" in reason for reason in outcome.reasons)
    monkeypatch.setattr(generator, "generate", None, raising=False)
    monkeypatch.setattr(Judge, "_ask", lambda self, text: "Score: 1")
    one["scorers"]["judge"] |= {"base_url": "http://127.0.0.1:2/v1"}
    (row,) = evaluate(generator, tiny_checkpoint, tmp_path, data, **one).rows
    assert (row.accuracy, row.problems, row.unscored) == (1, 8, 0)
    monkeypatch.setattr(Judge, "_ask", None)
    (again,) = evaluate(generator, tiny_checkpoint, tmp_path, data, **one).rows
    assert again == row


def test_a_budget_needs_room_for_an_answer(generator, tiny_checkpoint, tmp_path, data):  # noqa: F811
    with pytest.raises(UserError, match="budget of 12 leaves no room"):
        evaluate(generator, tiny_checkpoint, tmp_path, data, modes=[ThinkMode(True, 12)])


def test_windows_hold_all_samples(generator, tiny_checkpoint, tmp_path, data, monkeypatch):  # noqa: F811
    monkeypatch.setattr(run, "_WINDOW", 3)
    outcome = evaluate(generator, tiny_checkpoint, tmp_path, data, modes=MODES[:1])
    assert outcome.rows[0].problems == 8 and outcome.rows[0].accuracy == 0.5


def test_accuracy_by_budget(generator, said):
    """Of the problems whose reference is the model's own direct answer all are right without thinking."""
    problems = [
        (Record(messages=[{"role": "user", "content": words}, {"role": "assistant", "content": answer}]), ())
        for words, answer in zip(WORDS, said)
    ]
    rows = accuracy_by_budget(generator, problems, [4, None, 0], max_new_tokens=NEW)
    assert [(row.think, row.budget) for row in rows] == [(False, None), (True, 0), (True, 4), (True, None)]
    assert rows[0].accuracy == 1.0 and all(row.problems == 8 for row in rows)
    assert rows[1].most_thinking_tokens == 0 and rows[2].most_thinking_tokens <= 4
    assert all(row.thinking_tokens <= after.thinking_tokens for row, after in zip(rows[1:], rows[2:]))
    with pytest.raises(ValueError, match="no problem"):
        accuracy_by_budget(generator, [], [0])


def test_samples_of_a_problem_count_as_one():
    one = Result("a", False, None, 0, 1.0, "", False, None, "x", 0, 1, 5, True)
    results = [one, replace(one, sample=1, score=0.0), replace(one, key="b"), replace(one, key="c", score=None)]
    row = summarize(ThinkMode(False), results)
    assert (row.accuracy, row.problems, row.unscored) == (0.75, 2, 1)
    assert summarize(ThinkMode(False), []).accuracy is None


@pytest.mark.parametrize(
    "right, count, low, high",
    [(5, 10, 0.2366, 0.7634), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson(right, count, low, high):
    """The last row is an example of Newcombe's (1998, Statistics in Medicine 17, 857)."""
    assert wilson(right / count, count) == pytest.approx((low, high), abs=1e-4)


def test_batches_hold_so_many_tokens():
    lengths = [5, 50, 7, 500, 6]
    found = list(batches(lengths, new_tokens=10, samples=2, tokens_at_once=140))
    assert found == [[3], [1], [2, 4, 0]]
    assert sorted(number for batch in found for number in batch) == [0, 1, 2, 3, 4]
    for batch in found:
        assert len(batch) == 1 or max(lengths[n] + 10 for n in batch) * 2 * len(batch) <= 140


def test_modes():
    assert think_modes(True, False) == [ThinkMode(True)]
    assert think_modes(True, True, [None, 8, 0, 8]) == [
        ThinkMode(False),
        ThinkMode(True, 0),
        ThinkMode(True, 8),
        ThinkMode(True),
    ]


def test_a_record_that_has_changed_is_asked_again(generator, tiny_checkpoint, tmp_path, data):  # noqa: F811
    before = evaluate(generator, tiny_checkpoint, tmp_path, data)
    kept = len(lines(tmp_path))
    evaluate(generator, tiny_checkpoint, tmp_path, data)
    assert len(lines(tmp_path)) == kept, "nothing was new"
    data.write_text(data.read_text().replace('"answer": "', '"answer": "other than '))
    after = evaluate(generator, tiny_checkpoint, tmp_path, data)
    assert len(lines(tmp_path)) == 2 * kept
    assert before.rows[0].accuracy == 0.5 and after.rows[0].accuracy == 0
