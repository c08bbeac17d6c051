"""The ledger: one row a bad sample over threads, processes and runs; nothing it meets stops a run."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nemo_bluelm.data.ledger import Entry, Ledger
from nemo_bluelm.errors import UserError

CHECKOUT = Path(__file__).parents[2]


def entry(offset=0, sha1="a", stage="decode", shard="s.tar", error="not an image"):
    return Entry(shard, f"k{offset}", offset, sha1, error, stage)


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "quarantine.jsonl")


def test_a_row_is_there_once(ledger):
    assert ledger.append(entry(0)) is True
    assert ledger.append(entry(0, error="another reason")) is False
    assert ledger.append(entry(0, sha1="b")) is True
    assert ledger.append(entry(1)) is True
    assert Ledger(ledger.path).append(entry(1)) is False
    rows = ledger.entries()
    assert [(row.offset, row.sha1) for row in rows] == [(0, "a"), (0, "b"), (1, "a")]
    assert rows[0].error == "not an image" and rows[0].time.endswith("+00:00")


def test_two_ledgers_learn_from_each_other(ledger):
    other = Ledger(ledger.path)
    assert ledger.append(entry(0)) and other.append(entry(1))
    assert not ledger.append(entry(1)) and not other.append(entry(0))
    assert len(ledger.entries()) == 2


def test_processes_and_threads_write_whole_rows_once(ledger):
    program = (
        "import sys\nfrom pathlib import Path\nfrom nemo_bluelm.data.ledger import Entry, Ledger\n"
        "ledger = Ledger(Path(sys.argv[1]))\n"
        "for n in range(200): ledger.append(Entry('s', 'k', n, 'a', 'é' * 3000, 'decode'))"
    )
    command = [sys.executable, "-c", program, str(ledger.path)]
    processes = [subprocess.Popen(command, cwd=CHECKOUT) for _ in range(3)]
    work = [threading.Thread(target=lambda: [ledger.append(entry(n, shard="s")) for n in range(200)]) for _ in range(2)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert [process.wait() for process in processes] == [0, 0, 0]
    rows = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    assert sorted(row["offset"] for row in rows) == list(range(200))


def test_apply_leaves_out_what_failed_before_it(ledger):
    for offset, stage in enumerate(["index", "read", "decode"]):
        ledger.append(entry(offset, stage=stage))
    assert ledger.excluded() == set()
    assert ledger.apply() == 2
    assert ledger.excluded() == {("s.tar", 1), ("s.tar", 2)}
    ledger.append(entry(3))
    assert ledger.excluded() == {("s.tar", 1), ("s.tar", 2)}
    assert ledger.apply() == 3
    assert Ledger(ledger.path).excluded() == {("s.tar", 1), ("s.tar", 2), ("s.tar", 3)}
    assert len(ledger.entries()) == 4


def test_applying_nothing(ledger):
    assert ledger.apply() == 0
    assert ledger.excluded() == set() and ledger.entries() == []


def test_a_row_that_a_killed_process_left_behind(ledger):
    ledger.append(entry(0))
    with open(ledger.path, "ab") as file:
        file.write(b'{"shard": "s.tar", "key')
    assert Ledger(ledger.path).append(entry(1)) is True
    assert [row.offset for row in ledger.entries()] == [0, 1]
    assert ledger.append(entry(1)) is False


def test_a_removed_ledger_begins_anew(ledger):
    ledger.append(entry(0))
    ledger.append(entry(1))
    ledger.path.unlink()
    assert ledger.append(entry(0)) is True
    assert [row.offset for row in ledger.entries()] == [0]


def test_a_ledger_that_cannot_be_written_warns_once(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    ledger = Ledger(tmp_path / "file" / "quarantine.jsonl")
    assert ledger.append(entry(0)) is False
    assert ledger.append(entry(1)) is False
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "quarantine.jsonl can't be written: Not a directory" in warning


def test_a_full_disk_leaves_no_half_row(ledger, monkeypatch, capsys):
    ledger.append(entry(0))
    before, write = ledger.path.read_bytes(), os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:20]))
    assert ledger.append(entry(1)) is False
    monkeypatch.undo()
    assert ledger.path.read_bytes() == before
    assert "No space left on device" in capsys.readouterr().err
    assert ledger.append(entry(1)) is True


def test_clear_takes_back_what_apply_left_out(ledger):
    ledger.append(entry(0, stage="index"))
    ledger.append(entry(1))
    assert ledger.clear() == 0  # nothing was left out
    assert ledger.apply() == 1 and ledger.clear() == 1
    assert ledger.excluded() == set() and ledger.clear() == 0
    ledger.append(entry(2))
    assert ledger.excluded() == set()
    assert ledger.apply() == 1 and ledger.excluded() == {("s.tar", 2)}


@pytest.mark.parametrize("again", [False, True])
def test_a_sample_that_fails_again_after_clear_gets_a_row_again(ledger, again):
    ledger.append(entry(0, stage="index"))
    ledger.append(entry(1))
    ledger.apply()
    Ledger(ledger.path).clear()
    other = Ledger(ledger.path) if again else ledger
    assert other.append(entry(0, stage="index")) is False
    assert other.append(entry(1)) is True and other.append(entry(1)) is False
    assert ledger.apply() == 1 and ledger.excluded() == {("s.tar", 1)}


DAMAGED = [
    {"shard": "x"},
    {"applied": 1},
    {"applied": 1, "cleared": 1, "time": ""},
    dataclasses.asdict(entry(7)) | {"more": 1},
    dataclasses.asdict(entry(7)) | {"shard": ["s.tar"]},
    dataclasses.asdict(entry(7)) | {"offset": "7"},
    dataclasses.asdict(entry(7)) | {"offset": True},
    dataclasses.asdict(entry(7)) | {"offset": 1 << 70},
    dataclasses.asdict(entry(7)) | {"error": None},
    [],
    "row",
    None,
]


def test_rows_that_are_not_ours_are_no_rows(ledger):
    ledger.append(entry(0))
    with open(ledger.path, "ab") as file:
        file.write(b"\xff\n" + b"[" * 100_000 + b"\n" + "".join(json.dumps(row) + "\n" for row in DAMAGED).encode())
    assert ledger.excluded() == set()  # a damaged marker is none
    assert ledger.append(entry(1)) is True and Ledger(ledger.path).append(entry(1)) is False
    assert [row.offset for row in ledger.entries()] == [0, 1]
    assert ledger.apply() == 2 and ledger.excluded() == {("s.tar", 0), ("s.tar", 1)}


def test_a_ledger_that_cannot_be_read_is_one_line(ledger):
    ledger.path.mkdir()
    for use in (ledger.entries, ledger.excluded, ledger.apply, ledger.clear):
        with pytest.raises(UserError, match="quarantine.jsonl can't be used: Is a directory; mend it, or move it away"):
            use()
    assert ledger.append(entry(0)) is False


def test_a_ledger_of_somebody_else(public_folder):
    """As another user, since root may read everything."""
    path = public_folder / "quarantine.jsonl"
    path.touch(0o600)
    program = (
        "import os, sys; from nemo_bluelm.data.ledger import Ledger, UserError; os.setuid(65534)\n"
        "try: Ledger(sys.argv[1]).entries()\nexcept UserError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", program, str(path)], cwd=CHECKOUT, capture_output=True, text=True)
    assert f"{path} can't be used: Permission denied" in result.stdout, result.stderr
