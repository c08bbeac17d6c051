"""Launches on a real Slurm of four nodes on this machine: what the cluster does to runs changes no bit of them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from nemo_bluelm.config.pipeline import quoted
from tests.runtime.processes import CHECKOUT, TRAIN, run
from tests.runtime.test_restarts import FEW_STEPS

CURVE = ("step", "loss", "grad_norm", "lr", "tokens_by_source")
CLUSTER = {
    **{"nodes": 2, "gpus_per_node": 0, "tasks_per_node": 1, "gpu_request": "none", "partition": "batch"},
    **{"mem": None, "exclusive": False, "time": "00:20:00", "warn_before": 60, "env": {"OMP_NUM_THREADS": "1"}},
}
STEPS = 24
SHORT = [f"train.steps={STEPS}", "train.save_every=5", "train.global_batch_size=2", "optim.warmup_steps=1"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Slurm's environment; it is brought up for these tests."""
    if os.geteuid() or subprocess.run(["which", "apt-get"], capture_output=True).returncode:
        pytest.skip("a local Slurm needs root and Debian's packages")
    folder = Path("/tmp") / f"slurm-{os.getpid()}"  # a short path: sockets lie in it
    environment = {
        **os.environ,
        "LOCAL_SLURM_DIR": str(folder),
        "LOCAL_SLURM_PORT": str(18000 + os.getpid() % 1000 * 10),
    }
    up = subprocess.run([CHECKOUT / "tools" / "local_slurm.sh", "up"], env=environment, capture_output=True, text=True)
    assert up.returncode == 0, up.stderr
    environment["SLURM_CONF"] = re.fullmatch(r"export SLURM_CONF=(.*)\n", up.stdout)[1]
    yield environment
    down = subprocess.run(
        [CHECKOUT / "tools" / "local_slurm.sh", "down"], env=environment, capture_output=True, text=True
    )
    assert down.returncode == 0, down.stderr
    assert not folder.exists()


class Launches:
    """Calls ``nemo-bluelm launch`` and looks at what comes of it."""

    def __init__(self, folder, environment):
        self.folder, self.environment, self.roots = folder, environment, []

    def cli(self, *words):
        command = [sys.executable, "-m", "nemo_bluelm.cli.main", "launch", *map(str, words)]
        return subprocess.run(command, cwd=CHECKOUT, env=self.environment, capture_output=True, text=True, timeout=120)

    def cluster(self, **changes):
        file = self.folder / f"cluster_{len(list(self.folder.glob('cluster_*')))}.yaml"
        file.write_text(yaml.safe_dump({**CLUSTER, **changes}))
        return file

    def launch(self, recipe, root, *overrides, flags=(), **changes):
        """Ids of the jobs, by name."""
        self.roots.append(root)
        words = [recipe, "--cluster", self.cluster(**changes), "--json", f"run_dir={quoted(root)}", *flags, *overrides]
        done = self.cli(*words)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["jobs"]

    def slurm(self, *command):
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60).stdout

    def status(self, root):
        done = self.cli("status", root, "--json")
        assert done.returncode == 0, done.stderr
        return {row["run"]: row for row in json.loads(done.stdout)}

    def until(self, root, what, patience=180):
        """Wait until ``what(status)`` holds."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            rows = self.status(root)
            if what(rows):
                return rows
            time.sleep(0.5)
        raise AssertionError(f"{rows}\n{self.told(root)}")

    def told(self, root):
        files = [*root.glob("launch/**/slurm_*.log"), *root.glob("launch/**/rank_0.log")]
        return "\n".join(f"{file}:\n{file.read_text()[-1500:]}" for file in sorted(files))

    def complete(self, root, patience=180):
        return self.until(root, lambda rows: all(row["state"] == "COMPLETE" for row in rows.values()), patience)


@pytest.fixture
def launches(slurm, tmp_path):
    launches = Launches(tmp_path, slurm)
    yield launches
    for root in launches.roots:
        launches.cli("cancel", root)
    end = time.monotonic() + 30
    while launches.slurm("squeue", "--noheader").strip() and time.monotonic() < end:
        time.sleep(0.2)


def curve(run_dir):
    """What every step's line has, but times."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines() if (run_dir / "metrics.jsonl").exists() else []
    return [tuple(json.loads(line)[key] for key in CURVE) for line in lines]


def wait_for_step(launches, root, run_dir, step, attempts):
    """Until the attempt of a number has written its line of a step."""
    end = time.monotonic() + 120
    while not (len(curve(run_dir)) >= step and len(list(root.glob("launch/*/logs/attempt_*"))) >= attempts):
        assert time.monotonic() < end, launches.told(root)
        time.sleep(0.1)


@pytest.fixture(scope="module")
def undisturbed(corpus, forks, tmp_path_factory):
    """The curve of a run of two ranks without Slurm."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    forks.run(*TRAIN, "tiny/sft", f"data.root={corpus}", f"run_dir={run_dir}", *SHORT, ranks=2)
    return curve(run_dir)


def ranks_of(run_dir):
    """Process ids of the ranks that work for a run folder, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            variables = (folder / "environ").read_bytes().decode().split("\0")
        except OSError:
            continue
        if "train" in words and any(str(run_dir) in word for word in words):
            rank = next((text.partition("=")[2] for text in variables if text.startswith("RANK=")), None)
            found[rank] = int(folder.name)
    return found


@pytest.mark.slow
def test_a_chain_of_jobs_on_two_nodes_equals_train_on_one_machine(launches, forks, corpus, tmp_path):
    pipeline = tmp_path / "chain.yaml"
    keys = ["train.save_every=4", "train.global_batch_size=4", "optim.warmup_steps=1"]
    second = ["init_from=${run:first}", "train.steps=8", *keys]
    stages = {
        "first": {"recipe": "tiny/align_projector", "overrides": ["train.steps=6", *keys]},
        "second": {"recipe": "tiny/joint_pretrain", "overrides": second},
    }
    pipeline.write_text(yaml.safe_dump({"name": "chain", "stages": stages}))
    root, alone = tmp_path / "it's $HOME" / "launched", tmp_path / "alone"  # quotes and dollars arrive unchanged
    jobs = launches.launch(pipeline, root, f"data.root={corpus}", tasks_per_node=2)
    told = launches.slurm("scontrol", "show", "job", jobs["second"][0])
    assert f"Dependency=afterok:{jobs['first'][0]}" in told
    for stage, recipe, start in (
        ("first", "tiny/align_projector", ["train.steps=6"]),
        ("second", "tiny/joint_pretrain", ["train.steps=8", f"init_from={alone / 'first'}"]),
    ):
        forks.run(*TRAIN, recipe, f"run_dir={alone / stage}", f"data.root={corpus}", *start, *keys, ranks=4)
    rows = launches.complete(root)
    assert {name: row["step"] for name, row in rows.items()} == {"first": 6, "second": 8}
    for stage, steps in (("first", 6), ("second", 8)):
        assert curve(root / stage) == curve(alone / stage) and len(curve(root / stage)) == steps
        assert (root / "launch" / stage / "logs" / "attempt_0" / "rank_3.log").exists()
        environment = json.loads((root / stage / "environment.json").read_text())
        assert environment["slurm_job"] == jobs[stage][0] and environment["world_size"] == 4
    again = launches.cli(
        pipeline, "--cluster", launches.cluster(tasks_per_node=2), f"run_dir={quoted(root)}", f"data.root={corpus}"
    )
    assert again.returncode == 0 and "first: complete" in again.stderr and "second: complete" in again.stderr


@pytest.mark.slow
def test_a_warning_and_a_killed_rank_are_survived(launches, undisturbed, corpus, tmp_path):
    """The end of the job's time comes first, then a rank is lost; the same job goes on both times."""
    root = tmp_path / "run"
    (job,) = launches.launch("tiny/sft", root, f"data.root={corpus}", *SHORT)["tiny_sft"]
    wait_for_step(launches, root, root, 3, 1)
    launches.slurm("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before the limit
    wait_for_step(launches, root, root, 12, 2)
    os.kill(ranks_of(root)["1"], signal.SIGKILL)
    row = launches.complete(root)["tiny_sft"]
    assert row["ended"] == ["time", "crash", "complete"] and row["job"] == job
    assert curve(root) == undisturbed
    assert "the run saves and ends" in launches.told(root)


@pytest.mark.long
def test_an_administrators_requeue_goes_on(launches, undisturbed, corpus, tmp_path):
    root = tmp_path / "run"
    (job,) = launches.launch("tiny/sft", root, f"data.root={corpus}", *SHORT)["tiny_sft"]
    wait_for_step(launches, root, root, 6, 1)
    launches.slurm("scontrol", "requeue", job)
    row = launches.complete(root)["tiny_sft"]
    assert row["attempts"] == 2 and row["ended"][-1] == "complete" and curve(root) == undisturbed


@pytest.mark.long
def test_an_attempt_that_gets_nowhere_is_not_repeated_for_ever(launches, corpus, tmp_path):
    root = tmp_path / "run"
    no_python = {**CLUSTER["env"], "PYTHONHASHSEED": "nonsense"}
    changes = {"max_restarts": 9, "max_stalls": 1, "health_check": None, "env": no_python}
    launches.launch("tiny/sft", root, f"data.root={corpus}", *SHORT, **changes)
    row = launches.until(root, lambda rows: rows["tiny_sft"]["state"] == "FAILED")["tiny_sft"]
    assert row["ended"] == ["crash", "crash"]
    assert "attempts in a row began at step 0, max_stalls is 1: given up" in launches.told(root)


@pytest.mark.long
def test_scancel_ends_it_for_good_and_a_new_launch_goes_on(launches, undisturbed, corpus, tmp_path):
    root = tmp_path / "run"
    (job,) = launches.launch("tiny/sft", root, f"data.root={corpus}", *SHORT)["tiny_sft"]
    wait_for_step(launches, root, root, 6, 1)
    launches.slurm("scancel", job)
    launches.until(root, lambda rows: rows["tiny_sft"]["state"] == "CANCELLED")
    time.sleep(7)  # longer than a requeued job would wait
    row = launches.status(root)["tiny_sft"]
    assert row["state"] == "CANCELLED" and row["ended"] == ["killed"]
    (other,) = launches.launch("tiny/sft", root, f"data.root={corpus}", *SHORT)["tiny_sft"]
    assert other != job
    launches.complete(root)
    assert curve(root) == undisturbed


@pytest.mark.long
def test_scancel_in_the_health_check_ends_it_for_good(launches, corpus, tmp_path):
    root, begun = tmp_path / "run", tmp_path / "begun"
    check = f"touch {begun}; sleep 20; true"
    (job,) = launches.launch("tiny/sft", root, f"data.root={corpus}", *SHORT, health_check=check)["tiny_sft"]
    launches.until(root, lambda rows: begun.exists())
    launches.slurm("scancel", job)
    launches.until(root, lambda rows: rows["tiny_sft"]["state"] == "CANCELLED")
    time.sleep(7)  # longer than a requeued job would wait
    row = launches.status(root)["tiny_sft"]
    assert row["state"] == "CANCELLED" and row["ended"] == ["killed"] and not curve(root)


@pytest.mark.long
def test_a_sweep_is_an_array(launches, corpus, tmp_path):
    root = tmp_path / "sweep"
    few = ["train.steps=3", "train.global_batch_size=1", "optim.warmup_steps=1"]
    flags = ["--sweep", "optim.lr=1e-3,2e-3", "--nodes", "1"]
    launches.launch("tiny/sft", root, f"data.root={corpus}", f"data.index={tmp_path / 'index'}", *few, flags=flags)
    rows = launches.complete(root)
    assert set(rows) == {"optim.lr=1e-3", "optim.lr=2e-3"}
    rates = [curve(root / name)[0][3] for name in sorted(rows)]
    assert rates[1] == pytest.approx(2 * rates[0])


REFUSED = {
    "partition": ({"partition": "gpus"}, [], "partition gpus is not there; this cluster has batch, limited, preempt"),
    "account": ({"partition": "limited", "account": "nope", "time": "00:05:00"}, [], "nvalid account"),
    "time": ({"partition": "limited", "account": "research"}, [], "time limit is invalid"),
    "nodes": ({}, ["--nodes", "9"], "Slurm refuses 'sbatch"),
    "excluded node": ({"exclude": "zz9"}, [], "Invalid node name specified"),
    "memory": ({"mem": "900G"}, [], "Memory specification can not be satisfied"),
    "unknown flag": ({"sbatch_extra": {"nonsense": "1"}}, [], "nonsense"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_cluster_refuses_is_one_line_and_nothing_is_queued(case, launches, corpus, tmp_path):
    changes, flags, expected = REFUSED[case]
    words = ["--cluster", launches.cluster(**changes), f"run_dir={tmp_path / 'run'}", f"data.root={corpus}"]
    sizes = ["train.global_batch_size=18"]
    done = launches.cli("tiny/sft", *words, *flags, *sizes)
    assert done.returncode == 2, done.stdout
    assert done.stderr.count("\n") == 1 and expected in done.stderr, done.stderr
    assert not launches.slurm("squeue", "--noheader").strip()


@pytest.mark.slow
def test_the_second_stage_is_refused_and_the_first_is_taken_back(launches, corpus, tmp_path):
    pipeline = tmp_path / "chain.yaml"
    keys = ["train.steps=6", "train.global_batch_size=36", "optim.warmup_steps=1"]
    stages = {
        "first": {"recipe": "tiny/align_projector", "overrides": keys},
        "second": {"recipe": "tiny/joint_pretrain", "overrides": ["init_from=${run:first}", *keys]},
    }
    pipeline.write_text(yaml.safe_dump({"name": "chain", "stages": stages}))
    words = [pipeline, "--cluster", launches.cluster(), f"run_dir={tmp_path / 'run'}", f"data.root={corpus}"]
    done = launches.cli(*words, "--nodes", "second=9")
    assert done.returncode == 2 and "sbatch" in done.stderr and "Traceback" not in done.stderr
    end = time.monotonic() + 20
    while launches.slurm("squeue", "--noheader").strip():
        assert time.monotonic() < end
        time.sleep(0.2)


# ---- longer ones


@pytest.mark.long
def test_the_tiny_pipeline_as_jobs_of_two_nodes_equals_train(launches, corpus, tmp_path):
    keys = [*FEW_STEPS, "long_context.train.global_batch_size=4", f"data.root={corpus}"]
    root, alone = tmp_path / "launched", tmp_path / "alone"
    alone_keys = [f"run_dir={alone}", f"data.index={tmp_path / 'a'}", *keys]
    run(*TRAIN, "tiny/pipeline", *alone_keys, "--nproc", "4", timeout=3000)
    launches.launch("tiny/pipeline", root, f"data.index={tmp_path / 'b'}", *keys, tasks_per_node=2)
    rows = launches.complete(root, patience=3000)
    stages = [name for name in rows if (alone / name / "metrics.jsonl").exists()]
    assert len(stages) >= 10
    for stage in stages:
        assert curve(root / stage) == curve(alone / stage), stage


@pytest.mark.long
def test_the_real_time_limit(launches, undisturbed, corpus, tmp_path):
    """A minute of which 45 s are left when the run is told; what remains to do is done by the same job."""
    root, slow = tmp_path / "run", ["train.log_every=1"]
    launches.launch("tiny/sft", root, f"data.root={corpus}", *SHORT, *slow, time="00:01:00", warn_before=48)
    row = launches.complete(root, patience=400)["tiny_sft"]
    assert row["ended"][0] == "time" and row["ended"][-1] == "complete"
    assert curve(root) == undisturbed


@pytest.mark.long
def test_a_node_that_fails_in_a_step_is_survived(launches, slurm, undisturbed, corpus, tmp_path):
    root = tmp_path / "run"
    launches.launch("tiny/sft", root, f"data.root={corpus}", *SHORT)
    wait_for_step(launches, root, root, 6, 1)
    daemon = int((Path(slurm["LOCAL_SLURM_DIR"]) / "slurmd.n2.pid").read_text())
    os.kill(daemon, signal.SIGKILL)
    os.kill(ranks_of(root)["1"], signal.SIGKILL)  # all that ran on it is gone at once
    row = launches.complete(root, patience=300)["tiny_sft"]
    assert row["attempts"] >= 2 and curve(root) == undisturbed
    subprocess.run([CHECKOUT / "tools" / "local_slurm.sh", "up"], env=slurm, check=True, capture_output=True)


@pytest.mark.long
def test_preemption_is_survived(launches, undisturbed, corpus, tmp_path):
    root = tmp_path / "run"
    launches.launch("tiny/sft", root, f"data.root={corpus}", *SHORT, partition="preempt")
    wait_for_step(launches, root, root, 6, 1)
    words = ["sbatch", "--parsable", "-p", "batch", "-N4", "--exclusive", "-t1", "-o", "/dev/null", "--wrap", "sleep 2"]
    assert launches.slurm(*words).strip()
    row = launches.complete(root, patience=300)["tiny_sft"]
    assert row["attempts"] >= 2 and row["ended"][-1] == "complete"
    assert curve(root) == undisturbed


@pytest.mark.long
def test_an_unhealthy_node_is_named_and_left_out(launches, undisturbed, corpus, tmp_path):
    root = tmp_path / "run"
    check = 'test "$SLURMD_NODENAME" != n1 || { echo its fan is broken; false; }'
    launches.launch("tiny/sft", root, f"data.root={corpus}", *SHORT, health_check=check)
    row = launches.complete(root)["tiny_sft"]
    assert row["ended"] == ["health", "complete"] and curve(root) == undisturbed
    assert "not well: n1 (its fan is broken)" in launches.told(root)


@pytest.mark.long
def test_a_crash_loop_ends_and_what_follows_is_cancelled(launches, corpus, tmp_path):
    pipeline = tmp_path / "chain.yaml"
    keys = ["train.steps=6", "train.global_batch_size=2", "optim.warmup_steps=1"]
    stages = {
        "first": {"recipe": "tiny/align_projector", "overrides": keys},
        "second": {"recipe": "tiny/joint_pretrain", "overrides": ["init_from=${run:first}", *keys]},
    }
    pipeline.write_text(yaml.safe_dump({"name": "chain", "stages": stages}))
    root = tmp_path / "run"
    no_python = {**CLUSTER["env"], "PYTHONHASHSEED": "nonsense"}  # it ends at once
    launches.launch(pipeline, root, f"data.root={corpus}", max_restarts=1, env=no_python, health_check=None)
    rows = launches.until(
        root, lambda rows: rows["first"]["state"] == "FAILED" and rows["second"]["state"] == "CANCELLED"
    )
    assert rows["first"]["ended"] == ["crash", "crash"] and rows["second"]["attempts"] == 0
    assert "max_restarts is 1: given up" in launches.told(root)


@pytest.mark.long
def test_a_users_mistake_is_not_tried_again(launches, corpus, tmp_path):
    root = tmp_path / "run"
    diverges = ["optim.lr=1e30", "optim.clip_grad=0"]
    launches.launch("tiny/sft", root, f"data.root={corpus}", *SHORT, *diverges)
    row = launches.until(root, lambda rows: rows["tiny_sft"]["state"] == "FAILED")["tiny_sft"]
    assert row["ended"] == ["crash"]
    assert "NaN or infinite" in launches.told(root)


@pytest.mark.long
def test_a_chain_where_requeue_is_not_allowed(launches, undisturbed, corpus, tmp_path):
    root = tmp_path / "run"
    jobs = launches.launch("tiny/sft", root, f"data.root={corpus}", *SHORT, resume="chain", chain_length=3)["tiny_sft"]
    assert len(jobs) == 3
    wait_for_step(launches, root, root, 6, 1)
    launches.slurm("scancel", "--batch", "--signal=USR1", jobs[0])
    row = launches.complete(root)["tiny_sft"]
    assert row["ended"] == ["time", "complete"] and curve(root) == undisturbed


@pytest.mark.long
def test_secrets_reach_the_run_and_no_file_that_others_read(launches, corpus, tmp_path):
    root = tmp_path / "run"
    launches.environment = {**launches.environment, "PROBE_TOKEN": "s3cret 'x'"}
    few = ["train.steps=2", "train.global_batch_size=2", "optim.warmup_steps=1"]
    check = f'printf %s "$PROBE_TOKEN" > {tmp_path}/seen'
    launches.launch("tiny/sft", root, f"data.root={corpus}", *few, secrets=["PROBE_TOKEN"], health_check=check)
    launches.complete(root)
    assert (tmp_path / "seen").read_text() == "s3cret 'x'"
    holders = [file for file in root.rglob("*") if file.is_file() and b"s3cret" in file.read_bytes()]
    assert [file.name for file in holders] == ["secrets.env"] and holders[0].stat().st_mode & 0o077 == 0
