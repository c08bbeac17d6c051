"""Tasks and their records: packaged ones fill in, mistakes name what is nearest, bad records are named."""

import io
import json

import pytest
from PIL import Image

from nemo_bluelm.data.writer import RawSample, question_record, write_shard
from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate.samples import Sample, Skipped, find_data, read_samples
from nemo_bluelm.evaluate.tasks import Marker, load_task, open_marker, packaged_tasks
from nemo_bluelm.evaluate.template import compiled

JUDGE = ["scorers.judge.base_url=http://localhost:8000/v1", "scorers.judge.model=judge"]


def picture(shade=0):
    file = io.BytesIO()
    Image.new("RGB", (56, 40), (shade, 80, 255 - shade)).save(file, "PNG")
    return file.getvalue()


def task_file(folder, **content):
    content = {"name": "probe", "prompt": "{{ question }}", "scorers": {"exact": {}}, **content}
    (folder / "probe.yaml").write_text(json.dumps(content))  # JSON is YAML
    return str(folder / "probe.yaml")


def read(folder, records, overrides=(), **content):
    """Samples of a JSONL of these records; a text is a line as it is."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "data.jsonl").write_text("".join(f"{line}\n" for line in lines))
    task = load_task(task_file(folder, **content), list(overrides))
    with open_marker(task) as marker:
        return list(read_samples([str(folder / "data.jsonl")], task, marker))


@pytest.mark.parametrize("name", packaged_tasks())
def test_a_packaged_task_asks_a_record_with_the_fields_that_it_names(tmp_path, name):
    """One with options, and one without where the task says that they may be left out."""
    task = load_task(name, JUDGE if name == "mmvet" else [])
    for package in ("math_verify", "rapidfuzz"):
        pytest.importorskip(package)
    records = [
        {
            "question": "What is it?",
            "options": ["a rocket", "a cat"],
            "answer": "yes" if name == "hallusionbench" else "A",
            "instruction": "close the window",
            "expression": "the cat",
            "box": [1, 2, 3, 4],
            "prompt": "What is it? Use no commas.",
            "instruction_id_list": ["punctuation:no_comma"],
        }
    ]
    if name in ("mmmu", "mathvista", "mathvision", "realworldqa"):
        records.append({"question": "What is it?", "answer": "7"})
    if name == "conversations":
        records = [question_record("What is it?", "A", None, None, [])]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with open_marker(task) as marker:
        found = list(read_samples([str(tmp_path / "data.jsonl")], task, marker))
        assert all(isinstance(sample, Sample) for sample in found) and len(found) == len(records), found
        text = str(found[0].messages[0]["content"])
        assert any(word in text for word in ("What is it?", "close the window", "the cat"))
        assert "\\n\\n\\n" not in text and "{" not in text.replace("\\\\boxed{}", "").replace("[{'type'", ""), text
        answers = {"yes": "Yes.", "A": "A"}
        if name not in ("mmvet", "screenspot", "refcoco", "math_500", "gsm8k", "aime"):
            assert marker.score(answers[found[0].fields["answer"]], found[0].fields).value > 0


def test_images_stand_where_the_prompt_says_or_first(tmp_path):
    (tmp_path / "0.png").write_bytes(picture(1))
    (tmp_path / "1.png").write_bytes(picture(2))
    record = {"question": "q", "answer": "a", "images": ["0.png", "1.png"]}
    image = {"type": "image"}
    (first,) = read(tmp_path, [record])
    assert first.messages[0]["content"] == [image, image, {"type": "text", "text": "q"}]
    assert list(first.images) == [picture(1), picture(2)]
    (placed,) = read(tmp_path, [record], prompt="{{ image }}a{{ image }}{{ question }}")
    text = [{"type": "text", "text": text} for text in "aq"]
    assert placed.messages[0]["content"] == [image, text[0], image, text[1]]
    (wrong,) = read(tmp_path, [record], prompt="{{ image }}")
    assert "places for 1 images, the record has 2" in wrong.reason


def test_what_can_not_be_asked_is_named_and_the_rest_is_read(tmp_path):
    good = {"question": "q", "answer": "a"}
    records = [
        good,
        "{broken",
        "[]",
        {"question": "q"},
        {"qestion": "q", "answer": "a"},
        {**good, "images": ["none.png"]},
        {**good, "images": ["../up.png"]},
        {**good, "images": "0.png"},
        good,
    ]
    found = read(tmp_path, records)
    assert [isinstance(sample, Sample) for sample in found] == [True] + [False] * 7 + [True]
    skipped = [sample for sample in found if isinstance(sample, Skipped)]
    assert [sample.where for sample in skipped] == [f"{tmp_path}/data.jsonl: line {n}" for n in range(2, 9)]
    expected = ["JSON is invalid", "must be an object", "none of the task's scorers", "did you mean qestion"]
    expected += ["none.png", "no path below", "must be a list of the images' names"]
    for sample, reason in zip(skipped, expected):
        assert reason in sample.reason


def test_a_tar_and_the_rest_of_a_torn_one(tmp_path):
    samples = [
        RawSample(f"s{i}", {"question": f"q{i}", "answer": "a", "images": ["0.png"]}, {"0.png": picture(i)})
        for i in range(4)
    ]
    write_shard(tmp_path / "whole.tar", samples)
    content = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "torn.tar").write_bytes(content[: len(content) // 2])
    task = load_task(task_file(tmp_path), [])
    with open_marker(task) as marker:
        whole = list(read_samples(find_data([str(tmp_path / "w*.tar")]), task, marker))
        torn = list(read_samples([str(tmp_path / "torn.tar")], task, marker))
    assert [sample.images for sample in whole] == [(picture(i),) for i in range(4)]
    assert isinstance(torn[0], Sample) and isinstance(torn[-1], Skipped) and "is torn" in torn[-1].reason
    assert len({sample.key for sample in whole}) == 4


def test_the_first_scorer_that_applies_scores(tmp_path):
    with Marker(open_marker(load_task("mmmu", [])).scorers) as marker:
        choice, free = {"options": ["x", "y"], "answer": "B"}, {"answer": "ten"}
        assert marker.score("B", choice).value == 1 and marker.score("Ten", free).value == 1
        assert marker.score("<think>A</think> <think>no</think>B", choice).value == 1
        assert marker.score("<think>B</think>", choice).value == 0


@pytest.mark.parametrize(
    "overrides, content, message",
    [
        (["max_new_token=3"], {}, "unknown key max_new_token; did you mean max_new_tokens"),
        (["max_new_tokens=many"], {}, "max_new_tokens: .*many"),
        (["max_new_tokens=0"], {}, "max_new_tokens is 0"),
        (["mode=thinking"], {}, "mode is 'thinking'; it must be one of think, direct, both"),
        (["sampling.temperatur=1"], {}, "unknown key temperatur; did you mean temperature"),
        (["sampling.top_p=2"], {}, "top_p is 2.0"),
        (["scorers.exakt.case=true"], {}, "unknown key exakt; did you mean exact"),
        ([], {"scorers": {}}, "scorers is empty"),
        ([], {"scorer": {"exact": {}}}, "unknown key scorer; did you mean scorers"),
        ([], {"prompt": "{% if %}"}, "prompt: line 1"),
        ([], {"name": "a/b"}, "name is 'a/b'"),
        ([], {"name": None}, "name"),
    ],
)
def test_a_mistake_in_a_task(tmp_path, overrides, content, message):
    with pytest.raises(UserError, match=message):
        load_task(task_file(tmp_path, **content), overrides)


@pytest.mark.parametrize(
    "name, message", [("mmm", "did you mean mmmu"), ("a/b.yaml", "no such file"), ("", "no such task")]
)
def test_a_task_that_is_not_there(name, message):
    with pytest.raises(UserError, match=message):
        load_task(name, [])


def test_templates_reach_nothing_but_the_record():
    for text in ("{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{{ 1 // 0 }}", "{{ x.y.z }}"):
        with pytest.raises(UserError, match="probe"):
            compiled(text, "probe").render({"x": 1})
    assert compiled("{{ o | letters }}", "probe").render({"o": ["x", 2]}) == "A. x\nB. 2"
