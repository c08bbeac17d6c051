"""A checkpoint that was torn or changed anywhere is known, and the one before it is used."""

import json
import random
import shutil
import threading

import pytest
from torch.distributed import TCPStore

from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.checksums import CHECKSUMS_FILE, checksums, files_in, find_damage, write_checksums
from nemo_bluelm.runtime.environment import Launch
from nemo_bluelm.runtime.recovery import Ranks, newest_whole, published_steps
from nemo_bluelm.runtime.run_dir import checkpoint_path

FILES = {
    "weights/__0_0.distcp": 200_000,
    "weights/__0_1.distcp": 90_000,
    "weights/.metadata": 7_000,
    "weights/common.pt": 3_000,
    "recipe.yaml": 900,
    "tokenizer.json": 5_000,
}


def make(run_dir, step):
    """A published checkpoint of random bytes."""
    folder, bytes_of = checkpoint_path(run_dir, step), random.Random(step)
    for name, size in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes_of.randbytes(size))
    write_checksums(folder, checksums(folder, files_in(folder)))
    return folder


def tear(folder, case):
    """Cut a file off at a random byte, or change bytes from there on; every file of the checkpoint has its turn."""
    dice = random.Random(case)
    file = sorted(files_in(folder))[case % (len(FILES) + 1)]
    content = file.read_bytes()
    place = dice.randrange(len(content))
    if dice.random() < 0.5:
        file.write_bytes(content[:place])
    else:
        changed = bytes([content[place] ^ dice.randrange(1, 256)])
        file.write_bytes(content[:place] + changed + content[place + 1 :])
    return file


@pytest.mark.parametrize("case", range(50))
def test_torn_at_a_random_byte(case, tmp_path, capfd):
    ranks = Ranks(Launch())
    first, newest = make(tmp_path, 2), make(tmp_path, 4)
    assert newest_whole(tmp_path, [2, 4], ranks) == newest
    file = tear(newest, case)
    assert newest_whole(tmp_path, published_steps(tmp_path, ranks), ranks) == first
    told = capfd.readouterr().err
    assert str(newest) in told and file.name in told and "goes on from step_00000002" in told
    assert published_steps(tmp_path, ranks) == [2]
    assert newest.with_name("step_00000004.damaged").is_dir()


def test_checksums_that_could_be_anything_are_damage(tmp_path):
    folder = make(tmp_path, 1)
    whole = json.loads((folder / CHECKSUMS_FILE).read_text())
    for content in ("", "[]", '{"weights": 3}', '{"recipe.yaml": {"bytes": 900}}', "\0" * 30):
        (folder / CHECKSUMS_FILE).write_text(content)
        assert "cut off or overwritten" in find_damage(folder), content
    (folder / CHECKSUMS_FILE).write_text(json.dumps(whole))
    assert find_damage(folder) is None
    (folder / CHECKSUMS_FILE).unlink()  # of an earlier version
    assert find_damage(folder) is None


def test_each_rank_reads_its_share(tmp_path):
    folder = make(tmp_path, 1)
    (folder / "recipe.yaml").write_bytes(b"x")
    found = [find_damage(folder, rank, 3) for rank in range(3)]
    assert sum(damage is not None for damage in found) == 1


def test_ranks_agree_on_what_one_of_them_found(tmp_path, monkeypatch):
    first, newest = make(tmp_path, 2), make(tmp_path, 4)
    (newest / "recipe.yaml").write_bytes(b"x")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "WORLD_SIZE": 3, "RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    found = {}

    def be(rank):
        ranks = Ranks(Launch(rank, 3, 3))
        found[rank] = newest_whole(tmp_path, published_steps(tmp_path, ranks), ranks)

    threads = [threading.Thread(target=be, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == dict.fromkeys(range(3), first)


def test_one_set_aside_before_is_kept(tmp_path):
    make(tmp_path, 2)
    for _ in range(2):
        newest = make(tmp_path, 4)
        shutil.rmtree(newest / "weights")
        newest_whole(tmp_path, [2, 4], Ranks(Launch()))
    names = {folder.name for folder in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step_00000002", "step_00000004.damaged", "step_00000004.damaged.2"}


def test_none_is_whole(tmp_path):
    folder = make(tmp_path, 4)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.json is missing; none before it is whole"):
        newest_whole(tmp_path, [4], Ranks(Launch()))
    assert folder.is_dir()


@pytest.mark.parametrize("keep, left", [(-1, 6), (0, 0), (1, 1), (2, 2), (3, 3), (5, 5), (9, 6)])
def test_the_newest_are_kept(keep, left, tmp_path):
    from nemo_bluelm.runtime.environment import prepare

    prepare()
    from nemo_bluelm.runtime.checkpoints import Checkpoints

    checkpoints = Checkpoints(tmp_path, {}, save_every=1, keep=keep)
    for step in range(1, 7):
        checkpoint_path(tmp_path, step).mkdir(parents=True)
        checkpoints._prune()
    if checkpoints._deleting is not None:
        checkpoints._deleting.join()
    steps = range(7 - left, 7)
    assert {folder.name for folder in (tmp_path / "checkpoints").iterdir()} == {f"step_0000000{s}" for s in steps}
