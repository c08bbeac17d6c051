"""``nemo-bluelm eval`` end to end on a tiny model with random weights: table, plot, results, mistakes in one line."""

import json
import shlex

import pytest

from tests.conftest import one_line
from tests.evaluate.test_tasks import task_file
from tests.tiny_checkpoint import tiny_checkpoint  # noqa: F401

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def words(tmp_path):
    records = [
        {"question": f"what is {word}?", "answer": "A", "options": ["seven", "nine"]} for word in ("seven", "nine")
    ]
    path = tmp_path / "words.jsonl"
    path.write_text("{broken\n" + "".join(json.dumps(record) + "\n" for record in records))
    return path


def test_both_modes_and_several_budgets_in_one_run(cli, tiny_checkpoint, tmp_path, words):  # noqa: F811
    out, checkpoint = tmp_path / "out", str(tiny_checkpoint)
    command = [checkpoint, "--task", task_file(tmp_path), "--data", str(words), "--task", "ai2d", "--data", str(words)]
    command += shlex.split("--no-think --budgets 0,2,none probe.max_new_tokens=8 ai2d.max_new_tokens=10 --out")
    code, shown, told = cli("eval", *command, str(out))
    assert code == 0 and f"skipped {words}: line 1: the JSON is invalid" in told
    for text in ("no thinking", "thinking, 0 at most", "thinking, 2 at most", "1 records skipped", f"written to {out}"):
        assert text in shown
    tasks = json.loads((out / "table.json").read_text())["tasks"]
    assert list(tasks) == ["probe", "ai2d"]
    for task in tasks.values():
        assert [(row["think"], row["budget"]) for row in task["rows"]] == [
            (False, None), (True, 0), (True, 2), (True, None)
        ]  # fmt: skip
        assert [row["problems"] for row in task["rows"]] == [2] * 4
        assert [row["most_thinking_tokens"] for row in task["rows"]][:2] == [0, 0]
        assert task["rows"][2]["most_thinking_tokens"] <= 2 < task["rows"][3]["most_thinking_tokens"]
        assert task["skipped"][0]["where"] == f"{words}: line 1"
    assert (out / "table.md").read_text().count("\n") == 10
    assert (out / "plot.png").read_bytes().startswith(PNG)
    assert (
        len((out / "probe.jsonl").read_text().splitlines()) == len((out / "ai2d.jsonl").read_text().splitlines()) == 9
    )

    before = (out / "probe.jsonl").read_bytes(), (out / "table.json").read_bytes()
    code, shown, _ = cli("eval", *command, str(out), "--json")
    assert code == 0 and json.loads(shown)["tasks"] == tasks
    assert before == ((out / "probe.jsonl").read_bytes(), (out / "table.json").read_bytes())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--data {data}", "which task? --task NAME or --task FILE; packaged tasks: ai2d"),
        ("--task mmm --data {data}", "mmm: no such task; did you mean mmmu?"),
        ("--task ai2d", "there are 1 --task and 0 --data; give one for each; ai2d has none"),
        ("--task ai2d --data {data} --task ai2d --data {data}", "already a task ai2d"),
        ("--task ai2d --data none-*.jsonl", "matches no file"),
        ("--task ai2d --data {data} --budgets 1,x", "'1,x' is no list of budgets"),
        ("--task ai2d --data {data} --budgets 0,16 max_new_tokens=16", "budget of 16 leaves no room"),
        ("--task ai2d --data {data} --limit 0", "'0' is not a whole number"),
        ("--task ai2d --data {data} ai2d.max_tokens=3", "unknown key max_tokens; did you mean max_new_tokens?"),
        ("--task mmvet --data {data}", "scorer judge: base_url is None"),
    ],
)
def test_a_mistake_is_told_before_a_model_is_loaded(cli, tiny_checkpoint, words, monkeypatch, arguments, message):  # noqa: F811
    from nemo_bluelm.generate import generator

    monkeypatch.setattr(generator, "open_generator", None)
    code, _, err = cli("eval", str(tiny_checkpoint), *shlex.split(arguments.format(data=words)))
    assert message in one_line(code, err)


def test_no_checkpoint(cli, tmp_path, words):
    code, _, err = cli("eval", str(tmp_path / "none"), "--task", "ai2d", "--data", str(words))
    assert "CKPT is" in one_line(code, err)
