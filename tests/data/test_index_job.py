"""The index as a job: processes side by side, full disks, foreign folders, a million samples, Ctrl-C."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

from nemo_bluelm.data import index as index_module
from nemo_bluelm.data.writer import RawSample, write_shard
from nemo_bluelm.errors import UserError

CHECKOUT = Path(__file__).parents[2]


def test_parallel_is_serial(build, corpus, tmp_path):
    calls = []
    serial = build("[pt]*-train*", root=corpus, out="serial", workers=1)
    parallel = build("[pt]*-train*", root=corpus, out="parallel", workers=2, progress=lambda *call: calls.append(call))
    assert {n: s.digest for n, s in serial.items()} == {n: s.digest for n, s in parallel.items()}
    samples = sum(len(shard) for shard in serial.values())
    assert calls[0] == (0, len(serial), 0) and calls[-1] == (len(serial), len(serial), samples)
    assert all(a[0] <= b[0] and a[2] <= b[2] for a, b in zip(calls, calls[1:]))


def test_workers_report_bad_samples_and_failures(build, root, tmp_path):
    for n in range(3):
        write_shard(root / f"bad-{n}.tar", [RawSample("k", {"text": ""}), RawSample("l", {"text": "word"})])
    index = build("bad-*.tar", workers=2)
    assert [(len(shard), shard.rejected) for shard in index.values()] == [(1, 1)] * 3
    assert sorted(Path(row.shard).name for row in index.ledger.entries()) == ["bad-0.tar", "bad-1.tar", "bad-2.tar"]


def test_two_processes_build_one_index(build, corpus, tmp_path):
    program = (
        "import sys; from nemo_bluelm.data.index import build_index; from nemo_bluelm.data.tokenizer import Tokenizer\n"
        "from nemo_bluelm.geometry import Geometry\n"
        "root, out = sys.argv[1:]\n"
        "tokenizer = Tokenizer.load(f'{root}/tokenizer.json')\n"
        "index = build_index(['[pt]*-train*'], out, Geometry(tile=56), tokenizer, root=root)\n"
        "print(*(shard.digest for shard in index.values()))"
    )
    command = [sys.executable, "-c", program, str(corpus), str(tmp_path / "index")]
    processes = [subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE) for _ in range(3)]
    outputs = {process.communicate()[0] for process in processes}
    assert len(outputs) == 1 and [process.returncode for process in processes] == [0, 0, 0]
    alone = build("[pt]*-train*", root=corpus, out="alone")
    assert outputs.pop().decode().split() == [shard.digest for shard in alone.values()]
    assert len(list((tmp_path / "index").glob("*.arrow"))) == len(alone) > 3


def test_others_wait_while_one_builds(build, tmp_path):
    (tmp_path / "index").mkdir()
    lock = open(tmp_path / "index" / ".lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    thread = threading.Thread(target=build, daemon=True)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive() and not list((tmp_path / "index").glob("*.arrow"))
    lock.close()
    thread.join(60)
    assert not thread.is_alive() and len(list((tmp_path / "index").glob("*.arrow"))) == 2


def test_a_long_wait_is_told(build, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(index_module, "_SILENCE", 0.2)
    (tmp_path / "index").mkdir()
    lock = open(tmp_path / "index" / ".lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    thread = threading.Thread(target=build, daemon=True)
    thread.start()
    thread.join(1)
    assert capsys.readouterr().err == f"waiting for another process that writes to the index {tmp_path / 'index'}\n"
    lock.close()
    thread.join(60)
    assert not thread.is_alive() and capsys.readouterr().err == ""


def test_a_long_name_of_a_shard(build, root):
    name = "鲸" * 80 + ".tar"  # 244 bytes, of 255
    write_shard(root / name, [RawSample("k", {"text": "word"})])
    assert build(name)[name].sample(0).key == "k"


def test_files_where_a_worker_starts_are_none_of_its_modules(build, tmp_path, monkeypatch):
    (tmp_path / "html.py").write_text("raise SystemExit(3)")
    (tmp_path / "json.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    assert [len(shard) for shard in build(workers=2).values()] == [5, 7]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_leaves_nothing_half_written(workers, build, root, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        build("images-0.tar", out="disk")
        write_shard(root / "large.tar", [RawSample("k" * 90 + str(n), {"text": "x"}) for n in range(5000)])
        with pytest.raises(UserError, match="index .*disk can't be written: No space left on device; make room"):
            build(out="disk", workers=workers)
        assert not list(disk.glob("large*")) and not list(disk.glob("*.partial"))
        assert len(build("images-0.tar", out="disk")["images-0.tar"]) == 5
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_read_only_index_that_is_complete_serves(build, root, public_folder):
    """As another user, whom root's rights don't help."""
    moved, out = public_folder / "root", public_folder / "index"
    shutil.copytree(root, moved)
    index = build(root=moved, out=out)
    program = (
        "import os, sys; from nemo_bluelm.data.index import build_index; from nemo_bluelm.geometry import Geometry\n"
        "from nemo_bluelm.data.tokenizer import Tokenizer; from nemo_bluelm.errors import UserError\n"
        "import pyarrow, concurrent.futures.thread\n"
        "out, root, tokenizer, *shards = sys.argv[1:]\n"
        "tokenizer = Tokenizer.load(tokenizer)\n"
        "os.setuid(65534)\n"
        "try: print(sum(build_index(shards, out, Geometry(tile=56), tokenizer, root=root)['text-0.tar'].tokens))\n"
        "except UserError as error: print(error)"
    )

    def as_another():
        command = [sys.executable, "-c", program, str(out), str(moved), str(moved / "tokenizer.json"), "*.tar"]
        return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)

    result = as_another()
    assert result.stdout.strip() == str(index["text-0.tar"].num_tokens), result.stderr
    write_shard(moved / "new.tar", [RawSample("k", {"text": "x"})])
    assert "can't be written: Permission denied" in as_another().stdout


def write_many(path, count):
    """A tar of ``count`` short texts; ``tarfile`` would keep every member in memory."""
    with open(path, "wb") as file:
        for n in range(count):
            data = json.dumps(
                {"text": f"sample {n % 997} says: every word counts, and so does this one.", "tags": ["t"]}
            )
            info = tarfile.TarInfo(f"{n:08d}.json")
            info.size = len(data)
            file.write(info.tobuf(tarfile.USTAR_FORMAT) + data.encode() + bytes(-len(data) % tarfile.BLOCKSIZE))
        file.write(bytes(2 * tarfile.BLOCKSIZE))


PEAK = """
import json, sys, time
from nemo_bluelm.data.index import build_index
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.geometry import Geometry
shard, tokenizer, out = sys.argv[1:]
tokenizer, start = Tokenizer.load(tokenizer), time.perf_counter()
shard = build_index([shard], out, Geometry(), tokenizer, workers=1)[shard]
seconds = time.perf_counter() - start
peak = next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"samples": len(shard), "seconds": seconds, "peak": peak, "last": shard.sample(len(shard) - 1).key}))
"""


def peak(folder, corpus, count):
    """Index ``count`` samples in a process of its own; ``peak`` is its memory in MiB.

    Not ``ru_maxrss``: a process starts with that of the one which started it.
    """
    shard = folder / f"many-{count}.tar"
    write_many(shard, count)
    command = [sys.executable, "-c", PEAK, str(shard), str(corpus / "tokenizer.json"), str(folder / f"index-{count}")]
    result = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    shard.unlink()
    figures = json.loads(result.stdout)
    assert figures["samples"] == count and figures["last"] == f"{count - 1:08d}"
    return figures


def test_memory_does_not_grow_with_the_samples(tmp_path, corpus):
    small, large = peak(tmp_path, corpus, 5_000), peak(tmp_path, corpus, 25_000)
    assert large["peak"] - small["peak"] < 6, (small, large)  # tarfile's list of members would add 9


@pytest.mark.long
def test_a_million_samples(tmp_path, corpus):
    figures = peak(tmp_path, corpus, 1_000_000)
    print(figures)
    assert figures["peak"] < 200, figures


def test_ctrl_c_ends_workers_and_leaves_nothing_half_written(tmp_path, corpus):
    for n in range(2):
        write_many(tmp_path / f"many-{n}.tar", 30_000)
    out = tmp_path / "index"
    program = (
        "import sys; from nemo_bluelm.data.index import build_index; from nemo_bluelm.data.tokenizer import Tokenizer\n"
        "from nemo_bluelm.geometry import Geometry\n"
        "out, tokenizer, *shards = sys.argv[1:]\n"
        "try: build_index(shards, out, Geometry(), Tokenizer.load(tokenizer), workers=2)\n"
        "except KeyboardInterrupt: print('interrupted')"
    )
    shards = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    command = [sys.executable, "-c", program, str(out), str(corpus / "tokenizer.json"), *shards]
    process = subprocess.Popen(
        command,
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background jobs ignore Ctrl-C, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.partial"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, errors = process.communicate(timeout=60)
    assert (output, errors) == ("interrupted\n", "")
    assert not list(out.glob("*.partial"))
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
