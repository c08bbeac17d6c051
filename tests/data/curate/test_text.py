"""Curation of plain text: each planted fault goes for its own reason, good texts stay."""

import errno
import json

import pytest
from curation_pieces import Curation, chinese, english, text

from nemo_bluelm.errors import UserError

STEPS = {
    "length": {"min": 30},
    "language": None,
    "characters": None,
    "gopher_repetition": None,
    "gopher_quality": {"min_words": 40},
    "text_dedup": {"tasks": 3},
    "minhash_dedup": {"buckets": 5, "hashes": 4},
}
GERMAN = (
    "Der Fluss und die Brücke liegen hinter dem Garten, wo alte Männer mit ihren Hunden am Abend spazieren gehen, "
    "während Kinder auf dem Platz vor der Kirche spielen und Mütter ihnen zusehen. Niemand weiß, wann das Wasser "
    "wieder steigt, doch jeder hofft auf einen trockenen Sommer nach diesem langen Winter."
)


@pytest.fixture
def planted(tmp_path) -> Curation:
    near = english(1, 30).replace(english(1, 30).split(". ")[3], "Nobody had seen this one sentence before")
    curation = Curation(tmp_path, STEPS, tasks=2, samples_per_shard=3)
    curation.add(
        text("good-en", english(1, 30)),
        text("good-zh", chinese(2)),
        text("short", "Too short to learn from."),
        text("german", GERMAN),
        text("lines", "\n".join([english(3, 1)] * 10)),
        text("symbols", english(4, 3) + " " + "=#*~ " * 200),
        text("broken", english(5) + "\ufffd" * 40),
        text("hashes", english(6) + " " + "#" * 60),
    )
    return curation.add(
        text("copy-en", "  " + english(1, 30).replace(" ", "  ").replace("The", "THE")),
        text("copy-zh", chinese(2)),
        text("near", near),
        text("good-2", english(7)),
        text("good-3", english(8)),
        name="b.tar",
    )


def test_each_fault_goes_for_its_own_reason(planted):
    planted.run()
    dropped = planted.dropped()
    copies = {key: dropped.pop(key) for key in list(dropped) if dropped[key][1] == "duplicate"}
    assert dropped == {
        "short": ("length", "too_short"),
        "german": ("language", "language_other"),
        "broken": ("characters", "broken_characters"),
        "symbols": ("characters", "symbols"),
        "lines": ("gopher_repetition", "dup_line_frac"),
        "hashes": ("gopher_quality", "gopher_too_many_hashes"),
    }
    kept = planted.kept()
    assert copies == {
        "copy-en": ("text_dedup", "duplicate"),
        "copy-zh": ("text_dedup", "duplicate"),
        "near": ("minhash_dedup", "duplicate"),
    }
    assert set(kept) == {"good-en", "good-zh", "good-2", "good-3"}


def test_report_adds_up(planted):
    table = planted.run()
    report = planted.report()
    steps = report["steps"]
    assert [step["step"] for step in steps] == ["read", *STEPS]
    assert steps[0]["in"] == 13
    assert all(before["out"] == after["in"] for before, after in zip(steps, steps[1:]))
    assert all(step["in"] - step["out"] == sum(step["reasons"].values()) for step in steps)
    assert steps[-1]["out"] == report["records"] == len(planted.kept())
    assert sorted(report["shards"]) == sorted(path.name for path in planted.out.glob("*.tar"))
    assert "too_short 1" in table
    assert table == (planted.out / "report.txt").read_text()


def test_shards_hold_no_more_samples_than_asked(planted, tmp_path):
    planted.run("samples_per_shard=1")
    assert len(list(planted.out.glob("clean-*.tar"))) == 4
    assert not list(planted.out.glob(".writing-*"))


def test_two_runs_give_the_same_bytes(planted):
    first = planted.out
    planted.run("executor.workers=2")
    second = planted.folder / "out2"
    planted.run(f"output={second}")
    names = sorted(str(path.relative_to(first)) for path in first.rglob("*") if path.is_file())
    names = [name for name in names if not name.startswith("work")]
    assert len(names) > 8
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_finished_tasks_are_not_run_again(planted, monkeypatch):
    from nemo_bluelm.data.curate import write

    whole, failing = write._publish, [True]

    def fails_once_on_task_1(folder, name, samples):
        if "-00001-" in name and failing.pop():
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(folder, name, samples)

    monkeypatch.setattr(write, "_publish", fails_once_on_task_1)
    with pytest.raises(UserError, match="out can't be written: No space left on device; mend that and run it again"):
        planted.run()
    assert not (planted.out / "report.json").exists()
    first = {path.name: path.stat().st_mtime_ns for path in planted.out.glob("*.tar")}
    assert first
    failing.append(False)
    planted.run()
    assert {path.name: path.stat().st_mtime_ns for path in planted.out.glob("clean-00000-*.tar")} == first
    assert len(planted.kept()) == 4


def test_an_output_belongs_to_one_recipe(planted):
    planted.run()
    with pytest.raises(UserError, match="was begun with another steps.length.min"):
        planted.run("steps.length.min=31")
    assert planted.run()  # again the same: nothing to do
    planted.add(text("more", english(50)), name="c.tar")
    with pytest.raises(UserError, match="was begun with another shards.c.tar"):
        planted.run()


def test_c4_removes_lines_and_dropped_files_are_optional(tmp_path):
    curation = Curation(tmp_path, {"c4_quality": {"min_sentences": 3}}, keep_dropped=False)
    lines = english(1, 4).replace(". ", ".\n")
    curation.add(
        text("menu", "Home\nContact us\n" + lines + "\nWe use cookies on this page of ours."),
        text("lorem", lines + "\nLorem ipsum dolor sit amet."),
        text("zh", chinese(1)),
    )
    curation.run()
    assert {key: record.text for key, record in curation.kept().items()} == {"menu": lines, "zh": chinese(1)}
    assert not (curation.out / "dropped").exists()
    assert curation.report()["steps"][1]["reasons"] == {"lorem_ipsum": 1}


def test_samples_that_are_no_records_are_dropped_at_reading(tmp_path):
    curation = Curation(tmp_path, {"length": {"min": 1}}, input={"root": str(tmp_path / "in"), "shards": ["*"]})
    (tmp_path / "in" / "a.jsonl").write_text(
        "\n".join(
            [
                json.dumps({"text": english(1), "id": "first/one.x"}),
                "{not JSON",
                json.dumps({"messages": [{"role": "user"}]}),
                json.dumps({"text": "lone \ud800 surrogate"}),
                json.dumps({"messages": [{"role": "user", "content": "Hi"}], "images": ["gone.png"]}),
            ]
        )
    )
    curation.add(*(text(f"t{n}", english(n)) for n in range(10, 14)), name="b.tar")
    torn = tmp_path / "in" / "b.tar"
    torn.write_bytes(torn.read_bytes()[: 7 * 512])
    curation.run()
    assert set(curation.kept()) >= {"first/one.x", "t10"}
    reasons = curation.report()["steps"][0]["reasons"]
    assert reasons == {"bad_record": 3, "missing_image": 1, "torn_shard": 1}


def test_input_and_output_in_a_store(tmp_path):
    import fsspec

    store = fsspec.filesystem("memory")
    curation = Curation(tmp_path, {"length": {"min": 9}, "text_dedup": None})
    curation.add(text("a", english(1)), text("b", english(1)), text("short", "No."))
    store.put_file(str(tmp_path / "in" / "a.tar"), "/bucket/in/a.tar")
    table = curation.run("input.root=memory://bucket/in", "output=memory://bucket/out")
    assert "1 records in 1 shards" in table
    store.get_file("/bucket/out/clean-00000-0000.tar", str(tmp_path / "clean-0.tar"))
    curation.out = tmp_path
    assert set(curation.kept()) == {"a"}
