"""Shards: grouping, tears at every place, files by byte range in every kind of store."""

import gzip
import io
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import fsspec
import pytest
from data_pieces import image_sample
from fsspec.registry import known_implementations
from range_server import serve

from nemo_bluelm.data import files as files_module
from nemo_bluelm.data.shards import Files, Group, Member, ReadError, Torn, expand, scan
from nemo_bluelm.data.writer import RawSample, write_shard
from nemo_bluelm.errors import UserError

BLOCK = tarfile.BLOCKSIZE


def write_tar(path, *members, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_consecutive_members_with_one_key_are_a_sample(tmp_path):
    names = ["a/k.json", "a/k.0.png", "b/k.json", "a/k.json"]
    path = write_tar(tmp_path / "s.tar", *((name, b"x") for name in names))
    groups = list(scan(path))
    assert [group.key for group in groups] == ["a/k", "b/k", "a/k"]
    assert groups[0] == Group("a/k", 0, {"json": Member(512, 1), "0.png": Member(1536, 1)})
    assert [group.offset for group in groups] == [0, 2048, 3072]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names(form, tmp_path):
    name = "folder/" * 20 + "é" * 60
    path = write_tar(tmp_path / "s.tar", (f"{name}.json", b"{}"), ("next.json", b"{}"), format=form)
    first, second = scan(path)
    assert (first.key, first.offset) == (name, 0)
    assert second.offset == second.members["json"].offset - BLOCK  # the first one's long name lies before its data


def test_members_that_make_no_sample_are_told(tmp_path):
    path = write_tar(tmp_path / "s.tar", ("README", b""), ("k.json", b"1"), ("k.json", b"2"), (".x.json", b""))
    groups = list(scan(path))
    assert [group.key for group in groups] == ["README", "k", ".x.json"]
    assert all(group.bad for group in groups)
    assert "not named KEY.EXTENSION" in groups[0].bad and "k.json is there twice" in groups[1].bad


def test_a_name_that_is_not_unicode(tmp_path):
    path = write_tar(tmp_path / "s.tar", ("k\udcff.json", b"{}"), format=tarfile.GNU_FORMAT)
    (group,) = scan(path)
    group.key.encode()  # so that Arrow and JSON take it


def scanned(path):
    """(keys of the whole samples, the tear)."""
    keys = []
    try:
        for group in scan(str(path)):
            keys.append(group.key)
    except Torn as error:
        return keys, error
    return keys, None


def test_a_cut_at_any_place_keeps_the_samples_before_it(tmp_path):
    whole, cut = tmp_path / "whole.tar", tmp_path / "cut.tar"
    write_shard(whole, [image_sample(f"k{n}", 20 + n, 20) for n in range(4)])
    data = whole.read_bytes()
    starts = [group.offset for group in scan(str(whole))]
    last = list(scan(str(whole)))[-1].members["0.png"]
    end = -(-(last.offset + last.size) // BLOCK) * BLOCK
    for size in sorted({*range(0, end + BLOCK, BLOCK), *range(100, end + BLOCK, 300)}):
        cut.write_bytes(data[:size])
        keys, tear = scanned(cut)
        # The header of the next sample, or the mark of the end, proves that a sample lacks nothing.
        proven = sum(start + BLOCK <= size for start in starts[1:])
        assert keys == [f"k{n}" for n in range(proven)], size
        assert tear is not None and tear.offset == (starts[proven] if size >= BLOCK else 0), size
    cut.write_bytes(data[: end + BLOCK])
    assert scanned(cut) == ([f"k{n}" for n in range(4)], None)


def damage(data, at, size, byte):
    return data[:at] + bytes([byte]) * size + data[at + size :]


def test_damaged_headers(tmp_path):
    whole, broken = tmp_path / "whole.tar", tmp_path / "broken.tar"
    write_shard(whole, [RawSample(f"k{n}", {"text": "word"}) for n in range(4)])
    data, third = whole.read_bytes(), list(scan(str(whole)))[2].offset
    broken.write_bytes(damage(data, third, BLOCK, 0xEE))
    keys, tear = scanned(broken)
    assert keys == ["k0"] and tear.offset == third - 2 * BLOCK  # rubbish proves nothing about the sample before it
    broken.write_bytes(damage(data, third, BLOCK, 0))
    keys, tear = scanned(broken)
    assert keys == ["k0", "k1"] and tear.offset == third and "more data follows" in tear.reason
    broken.write_bytes(data + data)
    keys, tear = scanned(broken)
    assert keys == ["k0", "k1", "k2", "k3"] and "more data follows" in tear.reason


def test_a_negative_size_does_not_loop(tmp_path):
    path = tmp_path / "s.tar"
    write_shard(path, [RawSample("k", {"text": "word"})])
    header = bytearray(path.read_bytes()[:BLOCK])
    header[124:136] = b"\xff" * 12
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + path.read_bytes()[BLOCK:])
    assert scanned(path)[1] is not None


def extension(kind, size):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE], ids=repr)
@pytest.mark.parametrize("count", [0, 1])
def test_endless_headers(kind, count, tmp_path):
    """Thousands of extensions in a row, or one that claims to be huge, behind ``count`` whole samples."""
    path = tmp_path / "s.tar"
    write_shard(path, [RawSample(f"k{n}", {"text": "word"}) for n in range(count + 1)])
    whole, cut = path.read_bytes(), list(scan(str(path)))[-1].offset + 2 * BLOCK
    path.write_bytes(whole[:cut] + (extension(kind, 5) + b"x".ljust(BLOCK, b"\0")) * 5000)
    keys, tear = scanned(path)
    assert keys == [f"k{n}" for n in range(count)] and tear.offset == cut - 2 * BLOCK
    path.write_bytes(whole[:cut] + extension(kind, 7 << 30) + bytes(20 * BLOCK))
    keys, tear = scanned(path)
    assert keys == [f"k{n}" for n in range(count)] and "an extension of 7,516,192,768 bytes" in tear.reason
    path.write_bytes(extension(kind, 7 << 30) + bytes(20 * BLOCK))
    keys, tear = scanned(path)
    assert keys == [] and "an extension of 7,516,192,768 bytes" in tear.reason


@pytest.mark.parametrize("data", [b"", b"hello" * 400, b"\0" * 100], ids=["empty", "text", "zeros"])
def test_not_a_tar(data, tmp_path):
    (tmp_path / "s.tar").write_bytes(data)
    keys, tear = scanned(tmp_path / "s.tar")
    assert keys == [] and tear.offset == 0 and "not a tar" in tear.reason


def test_a_tar_without_samples_is_whole(tmp_path):
    assert scanned(write_tar(tmp_path / "s.tar")) == ([], None)


def test_a_compressed_tar_names_the_way_out(tmp_path):
    write_shard(tmp_path / "s.tar", [RawSample("k", {"text": "word"})])
    (tmp_path / "z.tar").write_bytes(gzip.compress((tmp_path / "s.tar").read_bytes()))
    assert scanned(tmp_path / "z.tar")[1].reason == "it is compressed with gzip; decompress it"


def test_jsonl_lines(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_bytes(b'{"a": 1}\n\n  \n{"b": 2}\r\nlast')
    groups = list(scan(str(path)))
    assert [(group.key, group.offset) for group in groups] == [("1", 0), ("4", 13), ("5", 23)]
    lines = [Files().read(str(path), *group.members["json"]) for group in groups]
    assert lines == [b'{"a": 1}\n', b'{"b": 2}\r\n', b"last"]


def test_a_jsonl_without_lines_does_not_fill_the_memory(tmp_path):
    path = tmp_path / "s.jsonl"
    with open(path, "wb") as file:
        file.write(b"{}\n")
        file.truncate(200 << 20)
    keys, tear = scanned(path)
    assert keys == ["1"] and tear.offset == 3 and "longer than 64 MiB" in tear.reason


def test_files_reads_ranges_in_threads(tmp_path):
    for n in range(8):
        (tmp_path / f"{n}").write_bytes(bytes([n]) * 1000)
    files, wrong = Files(tmp_path, max_open=2), []

    def work(seed):
        for i in range(500):
            n = (seed + i) % 8
            if files.read(f"{n}", i, 10) != bytes([n]) * 10:
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_files_errors_name_the_file(tmp_path):
    (tmp_path / "short").write_bytes(b"12345")
    (tmp_path / "folder.tar").mkdir()
    files = Files(tmp_path)
    with pytest.raises(ReadError, match="short has no 5 bytes at byte 3"):
        files.read("short", 3, 5)
    with pytest.raises(ReadError, match="nowhere can't be read: No such file"):
        files.read("nowhere", 0, 1)
    for use in (files.stat, files.open):
        with pytest.raises(ReadError, match="folder.tar can't be read"):
            use("folder.tar")


def test_a_file_of_somebody_else(public_folder):
    """As another user, since root may read everything."""
    path = public_folder / "s.tar"
    write_shard(path, [RawSample("k", {"text": "word"})])
    path.chmod(0o600)
    program = (
        "import os, sys; from nemo_bluelm.data.shards import scan, ReadError; os.setuid(65534)\n"
        "try: list(scan(sys.argv[1]))\nexcept ReadError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True)
    assert result.stdout == f"{path} can't be read: Permission denied\n", result.stderr


def test_expand(tmp_path):
    for name in ("b.tar", "a.tar", "sub/c.tar", "odd[1].tar", "d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.tar").mkdir()
    assert expand(tmp_path, ["*.tar", "a.tar", f"{tmp_path}/b.*"]) == ["a.tar", "b.tar", "odd[1].tar"]
    assert expand(tmp_path, ["**/*.tar"]) == ["a.tar", "b.tar", "odd[1].tar", "sub/c.tar"]
    assert expand(tmp_path, ["odd[1].tar"]) == ["odd[1].tar"]
    assert expand(tmp_path / "sub", [f"{tmp_path}/a.tar"]) == [f"{tmp_path}/a.tar"]
    assert expand(tmp_path / "sub", ["../a.tar", "c.tar"]) == [f"{tmp_path}/a.tar", "c.tar"]
    for patterns, words in ((["x*.tar"], "'x\\*.tar' matches no file"), ([], "no shards are named")):
        with pytest.raises(UserError, match=words):
            expand(tmp_path, patterns)
    with pytest.raises(UserError, match="nowhere is not a folder"):
        expand(tmp_path / "nowhere", ["*.tar"])


@pytest.fixture
def patient(monkeypatch):
    """No waiting between two attempts."""
    monkeypatch.setattr(files_module.time, "sleep", lambda seconds: None)


def test_a_store_in_memory(tmp_path):
    write_shard(tmp_path / "s.tar", [image_sample(f"k{n}") for n in range(3)])
    store = fsspec.filesystem("memory")
    store.pipe("/shelf/s.tar", (tmp_path / "s.tar").read_bytes())
    assert expand("memory://shelf", ["*.tar"]) == ["s.tar"]
    (elsewhere,) = expand(tmp_path, ["memory://shelf/*.tar"])
    assert Files(tmp_path).read(elsewhere, 0, 2) == b"k0"
    files = Files("memory://shelf")
    assert list(scan("s.tar", files)) == list(scan(str(tmp_path / "s.tar")))
    before = files.stat("s.tar")
    store.pipe("/shelf/s.tar", (tmp_path / "s.tar").read_bytes())
    assert files.stat("s.tar") != before


def test_a_web_server_with_ranges(tmp_path, patient):
    write_shard(tmp_path / "s.tar", [image_sample(f"k{n}", 300, 300) for n in range(30)])
    expected = list(scan(str(tmp_path / "s.tar")))
    with serve(tmp_path) as server:
        files = Files(server.url)
        assert expand(server.url, ["s.tar"]) == ["s.tar"]
        assert list(scan("s.tar", files)) == expected
        ranges = [wanted for _, wanted in server.requests if wanted]
        assert len(ranges) <= 4  # blocks, not a request for every member
        server.failures = 2
        member = expected[3].members["0.png"]
        data = (tmp_path / "s.tar").read_bytes()[member.offset :][: member.size]
        assert files.read("s.tar", *member) == data and server.failures == 0
        server.failures = 1000
        with pytest.raises(ReadError, match="s.tar can't be read, tried 3 times"):
            files.read("s.tar", *member)
        server.failures = 0
        with pytest.raises(ReadError, match="nowhere.tar can't be read"):
            files.read("nowhere.tar", *member)
        with pytest.raises(UserError, match="matches no file"):
            expand(server.url, ["nowhere.tar"])


def test_a_web_server_without_ranges_is_no_silent_rubbish(tmp_path, patient):
    write_shard(tmp_path / "s.tar", [image_sample("k", 300, 300)])
    with serve(tmp_path, ranges=False) as server, pytest.raises(ReadError, match="no byte ranges"):
        Files(server.url).read("s.tar", 5, 10)


def test_stores_that_nobody_knows(monkeypatch):
    with pytest.raises(UserError, match="Protocol not known: shelf"):
        Files().read("shelf://s.tar", 0, 1)
    plug_in = {"class": "shelffs.Shelf", "err": "Install shelffs to access shelves"}
    monkeypatch.setitem(known_implementations, "shelf", plug_in)
    with pytest.raises(UserError, match=r"needs a package that is not installed \(Install shelffs"):
        Files().read("shelf://s.tar", 0, 1)


def test_scanning_needs_no_torch():
    program = "import sys, nemo_bluelm.data.index_workers; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
