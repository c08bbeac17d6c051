"""Prompts: how they are read, in what order they are drawn, and what is wrong with records."""

import json
from collections import Counter

import pytest

from nemo_bluelm.config.schema import DataConfig, SourceConfig
from nemo_bluelm.errors import UserError
from nemo_bluelm.rl.dataset import AllTaskDataset, Curriculum

HARD = Curriculum("difficulty", 0.1, 100)


@pytest.fixture
def opened(tmp_path):
    """Opens a dataset of sources, each given as (weight, records)."""

    def open_them(seed=0, curriculum=None, **sources):
        found = {}
        for name, (weight, records) in sources.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            found[name] = SourceConfig(shards=[f"{name}.jsonl"], weight=weight)
        return AllTaskDataset(DataConfig(root=str(tmp_path), sources=found), seed, curriculum=curriculum)

    return open_them


def problems(count: int, **fields) -> list[dict]:
    return [{"problem": f"number {i}", "difficulty": count - i, **fields} for i in range(count)]


def asked(dataset, count: int) -> list[str]:
    return [dataset.draw().messages[0]["content"] for _ in range(count)]


def test_sources_are_drawn_by_their_weights_and_each_prompt_once_an_epoch(opened):
    dataset = opened(few=(1, problems(4)), many=(3, problems(30)))
    drawn = [dataset.draw() for _ in range(16)]
    assert Counter(task.source for task in drawn) == {"few": 4, "many": 12}
    assert len({(task.source, task.messages[0]["content"]) for task in drawn}) == 16
    assert [task.uid for task in drawn] == list(range(16)) and {task.task_name for task in drawn} == {"few", "many"}


def test_a_state_goes_on_where_it_was(opened):
    one, other = opened(a=(1, problems(9)), b=(1, problems(5))), opened(a=(1, problems(9)), b=(1, problems(5)))
    asked(one, 7)
    other.restore(json.loads(json.dumps(one.state())))
    assert asked(one, 20) == asked(other, 20)


def test_the_root_may_be_relative(opened, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}')
    dataset = AllTaskDataset(DataConfig(root=tmp_path.name, sources={"a": SourceConfig(shards=["*.jsonl"])}), 0)
    assert dataset.draw().fields == {"prompt": "x"}


def test_fields_and_names(opened):
    record = {"task_name": "math", "prompt": "1 + 1?", "expected_answer": "2", "args": {"tolerance": 0.1}}
    turns = [{"role": "user", "content": "so?"}, {"role": "assistant", "content": "yes"}]
    first, second = opened(mixed=(1, [record, {"messages": turns}])).first(2)
    assert (first.task_name, second.task_name) == ("math", "mixed")
    assert first.fields["expected_answer"] == "2" and first.fields["tolerance"] == 0.1
    assert second.fields["answer"] == "yes" and list(second.messages) == turns[:1]


def test_a_curriculum_begins_with_the_easiest_and_ends_with_all(opened):
    records = problems(100)  # the last is the easiest
    dataset = opened(curriculum=HARD, task=(1, records))
    easiest = [record["problem"] for record in reversed(records)]
    ranks = [easiest.index(text) for text in asked(dataset, 300)]
    for drawn, rank in enumerate(ranks[:100]):
        assert rank < 100 * (0.1 + 0.9 * drawn / 100)
    assert max(ranks[50:100]) > 50
    assert sorted(ranks[100:200]) == list(range(100))  # each once, as without a curriculum


def test_a_curriculum_is_resumed(opened):
    one = opened(curriculum=HARD, a=(1, problems(50)), b=(2, problems(70)))
    asked(one, 33)
    other = opened(curriculum=HARD, a=(1, problems(50)), b=(2, problems(70)))
    other.restore(one.state())
    assert asked(one, 40) == asked(other, 40)


@pytest.mark.parametrize("difficulty", [None, "hard", True, float("nan")])
def test_a_curriculum_needs_numbers(opened, difficulty):
    with pytest.raises(UserError, match=r"data\.sources\.task: .*task\.jsonl: line 1: difficulty is .*needs a number"):
        opened(curriculum=HARD, task=(1, [{"problem": "x", "difficulty": difficulty}]))


@pytest.mark.parametrize(
    "record, words",
    [
        ([], "must be an object"),
        ({}, "no messages, prompt or problem"),
        ({"prompt": "x", "images": "a.png"}, "images is 'a.png'"),
        ({"messages": "x"}, "must be a list of turns"),
        ({"messages": [{"role": "system", "content": "x"}]}, "don't end with the user's turn"),
    ],
)
def test_records_that_are_no_prompts(opened, record, words):
    with pytest.raises(UserError) as caught:
        opened(task=(1, [{"prompt": "fine"}, record]))
    assert words in str(caught.value) and "line 2" in str(caught.value) and "\n" not in str(caught.value)
