"""What a launch writes and refuses, without a scheduler."""

import json
import os
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from nemo_bluelm.errors import UserError
from nemo_bluelm.launch import health, launcher, slurm
from nemo_bluelm.launch.cluster import ClusterConfig, ContainerConfig, Resume, check_mounted, load_cluster, seconds
from nemo_bluelm.launch.jobs import Job, Plan, Unit, plan_jobs
from nemo_bluelm.launch.script import script_of, task_of
from nemo_bluelm.launch.slurm import State
from nemo_bluelm.resources import conf_dir


def cluster_file(tmp_path, content):
    file = tmp_path / "cluster.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(file)


def plan_of(tmp_path, *commands, **job):
    units = tuple(
        Unit(command, tmp_path / f"run{n}", tmp_path / f"run{n}" / "complete") for n, command in enumerate(commands)
    )
    return Plan("probe", tmp_path, (Job("sft", tmp_path / "launch" / "sft", units, **{"nodes": 2, "tasks": 4, **job}),))


@pytest.mark.parametrize(
    "time, expected",
    [
        *(
            ("90", 5400),
            ("05:30", 330),
            ("04:00:00", 14400),
            ("1-12", 129600),
            ("1-02:30", 95400),
            ("2-00:00:01", 172801),
        ),
        *(("soon", None), ("", None), ("1:2:3:4", None), ("-5", None), ("4h", None)),
    ],
)
def test_time_limits_as_slurm_writes_them(time, expected):
    assert seconds(time) == expected


@pytest.mark.parametrize("name", sorted(file.stem for file in (conf_dir() / "cluster").glob("*.yaml")))
def test_packaged_clusters_load(name):
    cluster = load_cluster(name)
    assert cluster.tasks >= 1 and load_cluster(f"{name}.yaml") == cluster


@pytest.mark.parametrize(
    "content, expected",
    [
        ({"partion": "x"}, "unknown key partion; did you mean partition?"),
        ({"container": {"imge": "x"}}, "unknown key container.imge; did you mean container.image?"),
        ({"nodes": "many"}, "nodes"),
        ({"nodes": 0}, "nodes is 0; it must be 1 or more"),
        ("time: 4:00:00", 'time is read as the number 14400; write it in quotes: "04:00:00"'),
        ({"time": "soon"}, "time is 'soon', no time limit; write minutes"),
        ({"time": "00:04:00"}, "warn_before is 300 s, which leaves nothing of time 00:04:00"),
        ({"time": "5-00", "max_time": "2-00"}, "time 5-00 is over max_time 2-00"),
        ({"resume": "maybe"}, "resume"),
        ({"container": {"mounts": ["/a:/a"]}}, "container.image is null"),
        ({"container": {"image": "x", "mounts": ["a:b"]}}, "a mount is /host/path:/path/inside"),
        ({"env": {"WANDB_API_KEY": "x"}}, "env.WANDB_API_KEY looks like a secret"),
        ({"secrets": ["A B"]}, "no name of a variable"),
        ({"port_base": 65000}, "port_base 65000 and port_span 10000"),
        ("- a\n- b", "a cluster is a mapping"),
        ("a: [", "line 1: not valid YAML"),
    ],
)
def test_a_mistake_in_a_cluster_file_is_one_line(content, expected, tmp_path):
    with pytest.raises(UserError) as raised:
        load_cluster(cluster_file(tmp_path, content))
    assert expected in str(raised.value) and "\n" not in str(raised.value)


def test_clusters_that_are_not_there():
    with pytest.raises(UserError, match="no such file; did you mean local.*h100"):
        load_cluster("locl")


@pytest.mark.parametrize(
    "cluster",
    [
        ClusterConfig(),
        ClusterConfig(
            resume=Resume.chain, gpus_per_node=0, health_check=None, secrets=["TOKEN"], setup=["module load cuda"]
        ),
        ClusterConfig(container=ContainerConfig(image="/i'm here.sqsh", mounts=["/a b:/a b"], name="kept")),
    ],
)
@pytest.mark.parametrize("runs", [1, 3])
def test_scripts_are_bash_and_say_what_was_asked_for(cluster, runs, tmp_path):
    plan = plan_of(tmp_path, *[("train", "r.yaml", f"seed={n}") for n in range(runs)])
    text = script_of(plan.jobs[0], plan, cluster, Path("/work place"))
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr
    head = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"nodes=2", "ntasks-per-node=4", 'chdir="/work place"', "export=NONE", "signal=B:USR1@300"} <= set(head)
    assert ("gpus-per-node=8" in head) == bool(cluster.gpus_per_node)
    assert ("array=0-2" in head) == (runs == 3)
    assert ("scontrol requeue" in text) == ("requeue" in head)
    assert ("nemo_bluelm.launch.health" in text) == (cluster.health_check is not None)
    if cluster.container.image:
        assert "--container-image='/i'\"'\"'m here.sqsh'" in text and "--no-container-mount-home" in text
    if cluster.secrets:
        assert str(tmp_path / "launch" / "secrets.env") in text and "module load cuda" in text


def test_words_reach_the_program_unchanged(tmp_path):
    """The script of a rank, run by bash with a Python that prints what it got."""
    odd = """it's "q" $HOME `id` \\ *  two"""
    probe = tmp_path / "python"
    probe.write_text('#!/bin/sh\nfor word in "$@" "$RANK" "$WORLD_SIZE" "$LOCAL_WORLD_SIZE"; do echo "$word"; done\n')
    probe.chmod(0o755)
    cluster = ClusterConfig(container=ContainerConfig(image="x", python=str(probe)))
    slurm = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4"}
    text = task_of(Unit(("train", "r.yaml", f"name={odd}"), tmp_path, tmp_path), cluster)
    done = subprocess.run(["bash", "-c", text], env={**os.environ, **slurm}, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["-m", "nemo_bluelm.cli.main", "train", "r.yaml", f"name={odd}", "5", "8", "4"]
    text = task_of(Unit(("prune", "a", "b"), tmp_path, tmp_path), cluster)
    assert "RANK" not in text.replace("# One rank", "") and shlex.split(text.splitlines()[-1])[-3:] == [
        "prune",
        "a",
        "b",
    ]


def test_a_folder_that_would_go_with_the_container_is_refused(tmp_path):
    mounted = ClusterConfig(container=ContainerConfig(image="x", mounts=[f"{tmp_path}:{tmp_path}"]))
    check_mounted(mounted, tmp_path / "runs" / "sft")
    check_mounted(ClusterConfig(), tmp_path)
    elsewhere = ClusterConfig(container=ContainerConfig(image="x", mounts=[f"{tmp_path}:/runs"]))
    with pytest.raises(UserError, match="would vanish with the container; add"):
        check_mounted(elsewhere, tmp_path / "runs")


@pytest.mark.parametrize(
    "words, expected",
    [
        (["tiny/sft"], "--cluster is missing"),
        (["tiny/sft", "--cluster", "local", "--nodes", "x"], "--nodes x: it is a whole number of 1 or more"),
        (["tiny/sft", "--cluster", "local", "--nodes", "sft=2"], "tiny/sft has no stages; say --nodes 2"),
        (["tiny/pipeline", "--cluster", "local", "--nodes", "stf=2"], "there is no such stage; there are recall"),
        (["tiny/pipeline", "--cluster", "local", "--sweep", "seed=1,2"], "a pipeline has runs of its own"),
        (["tiny/sft", "--cluster", "local", "--sweep", "seed"], "it is key=v1,v2"),
        (["tiny/sft", "--cluster", "local", "--time", "00:00:30"], "--time 00:00:30: write minutes"),
        (["tiny/sft", "--cluster", "local", "train.global_batch_size=3"], "not a multiple of the data parallel size 4"),
        (["tiny/sft", "--cluster", "local", "optim.lrr=1"], "unknown key optim.lrr"),
        (["status"], "launch status takes the run_dir"),
        (["status", "nowhere"], "nothing was launched from there"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(words, expected, corpus, cli):
    data = [f"data.root={corpus}"] if "tiny" in words[0] else []
    code, _, err = cli("launch", *words, *data)
    assert code == 2 and expected in err and err.count("\n") == 1, err


def test_a_dry_run_shows_everything_and_writes_nothing(corpus, cli, tmp_path):
    one = [f"{stage}.train.global_batch_size=4" for stage in ("text_teacher", "long_context")]
    data = [f"data.root={corpus}", *one, f"run_dir={tmp_path / 'runs'}"]
    code, out, err = cli("launch", "tiny/pipeline", "--cluster", "local", "--dry-run", *data)
    assert code == 0, err
    assert not (tmp_path / "runs").exists()
    assert out.count("#!/bin/bash\n# tiny_pipeline: ") == 12, "eleven runs and a pruning"
    assert "launch/rl/job.sbatch after " in out and "node hours before one is resumed" in out
    code, out, _ = cli("launch", "yarn", "--cluster", "local", "--dry-run", data[0], "train.global_batch_size=4")
    assert code == 0 and "ablate yarn" in out and "launch/measures/job.sbatch after" in out


def test_a_sweep_has_a_run_for_each_combination(corpus, tmp_path):
    overrides = [f"data.root={corpus}", f"run_dir={tmp_path}", "train.global_batch_size=4"]
    plan = plan_jobs("tiny/sft", overrides, ["optim.lr=1e-3,2e-3", "seed=1,2,3"], {}, 1, 1)
    (job,) = plan.jobs
    assert len(job.units) == 6 and len({unit.folder for unit in job.units}) == 6
    assert job.units[4].folder == tmp_path / "optim.lr=2e-3,seed=2"
    assert [word for word in job.units[4].command if word.startswith("run_dir=")] == [
        f"run_dir='{job.units[4].folder}'"
    ]


# ---- handing in


@pytest.fixture
def scheduler(monkeypatch):
    """Slurm's answers, and what it was asked."""
    asked = {"submitted": [], "cancelled": [], "states": {}, "refuse": None}

    def submit(script, after=(), kind="afterok"):
        if asked["refuse"] == script.parent.name:
            raise UserError("Slurm refuses it")
        asked["submitted"].append((script.parent.name, tuple(after), kind))
        return str(len(asked["submitted"]))

    monkeypatch.setattr(launcher.slurm, "submit", submit)
    monkeypatch.setattr(launcher.slurm, "cancel", lambda ids: asked["cancelled"].extend(ids))
    monkeypatch.setattr(launcher.slurm, "state", lambda job: State(asked["states"].get(job, "RUNNING")))
    monkeypatch.setattr(launcher.slurm, "account_problem", lambda *names: None)
    return asked


def chain(tmp_path, **changes):
    (job,) = plan_of(tmp_path, ("train", "r.yaml")).jobs
    first = replace(job, name="first", control=tmp_path / "launch" / "first", **changes)
    return Plan(
        "probe",
        tmp_path,
        (first, replace(job, name="second", control=tmp_path / "launch" / "second", after=("first",))),
    )


def test_a_chain_waits_and_what_runs_is_kept(scheduler, tmp_path):
    plan, cluster = chain(tmp_path), ClusterConfig()
    assert launcher.launch(plan, cluster) == {"first": ["1"], "second": ["2"]}
    assert scheduler["submitted"] == [("first", (), "afterok"), ("second", ("1",), "afterok")]
    scheduler["states"] = {"2": "FAILED"}
    assert launcher.launch(plan, cluster) == {"first": ["1"], "second": ["3"]}
    done = chain(tmp_path, units=tuple(replace(unit, done=True) for unit in plan.jobs[0].units))
    scheduler["states"]["3"] = "CANCELLED"
    assert launcher.launch(done, cluster) == {"second": ["4"]}
    assert scheduler["submitted"][-1] == ("second", (), "afterok")
    rows = {row["run"]: row for row in launcher.status(tmp_path)}
    assert rows["first"]["job"] == "1" and rows["second"]["state"] == "RUNNING"


def test_what_waits_for_a_job_that_is_gone_is_handed_in_anew(scheduler, tmp_path):
    plan = chain(tmp_path)
    launcher.launch(plan, ClusterConfig())
    scheduler["states"] = {"1": "CANCELLED", "2": "PENDING"}
    assert launcher.launch(plan, ClusterConfig()) == {"first": ["3"], "second": ["4"]}
    assert scheduler["cancelled"] == ["2"] and scheduler["submitted"][-1] == ("second", ("3",), "afterok")


def test_what_runs_with_other_words_is_not_taken_for_it(scheduler, tmp_path):
    sweep = [("train", "r.yaml", f"optim.lr={rate}") for rate in ("1e-4", "2e-4")]
    launcher.launch(plan_of(tmp_path, *sweep), ClusterConfig())
    with pytest.raises(UserError, match="job 1 is RUNNING with other words; wait for it, end it by"):
        launcher.launch(plan_of(tmp_path, *sweep, ("train", "r.yaml", "optim.lr=3e-4")), ClusterConfig())
    assert len(scheduler["submitted"]) == 1 and len(launcher.status(tmp_path)) == 2


def test_each_run_of_an_array_and_the_job_of_a_chain_that_is_due_has_its_state(scheduler, tmp_path):
    launcher.launch(plan_of(tmp_path, *[("train", "r.yaml", f"seed={n}") for n in range(2)]), ClusterConfig())
    scheduler["states"] = {"1_0": "FAILED", "1_1": "RUNNING"}
    assert [row["state"] for row in launcher.status(tmp_path)] == ["FAILED", "RUNNING"]
    root = tmp_path / "chain"
    launcher.launch(plan_of(root, ("train", "r.yaml")), ClusterConfig(resume=Resume.chain, chain_length=3))
    scheduler["states"] = {"2": "COMPLETED", "3": "RUNNING", "4": "PENDING"}
    assert [row["state"] for row in launcher.status(root)] == ["RUNNING"]


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Makes Slurm's commands, as shell scripts that note how they were called."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    (tmp_path / "bin").mkdir()

    def make(**scripts):
        for name, script in scripts.items():
            file = tmp_path / "bin" / name
            file.write_text(f"#!/bin/sh\necho {name} $* >>{tmp_path}/calls\n{script}\n")
            file.chmod(0o755)

    make(squeue="exit 0", scontrol="exit 0", sacct="echo accounting is disabled >&2; exit 1", scancel="exit 0")
    return make


def test_a_controller_that_does_not_answer_is_no_job_that_has_ended(commands, tmp_path):
    gone = "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1"
    commands(squeue=gone, scontrol=gone)
    assert slurm.state("7") == slurm.UNKNOWN and not slurm.UNKNOWN.active
    slurm.cancel(["7"])
    commands(squeue="echo Unable to contact slurm controller >&2; exit 1", scancel="echo No route to host >&2; exit 1")
    with pytest.raises(UserError, match="Slurm refuses 'squeue .*': Unable to contact slurm controller"):
        slurm.state("7")
    with pytest.raises(UserError, match="No route to host"):
        slurm.cancel(["7"])
    commands(squeue="echo 'SIGNALING|(None)'")
    assert slurm.state("7").active


def test_values_of_directives_are_quoted(tmp_path):
    plan = plan_of(tmp_path, ("train", "r.yaml"))
    cluster = ClusterConfig(sbatch_extra={"comment": 'two "words"'}, exclude="n[1-3]", constraint="a&b")
    text = script_of(plan.jobs[0], plan, cluster, tmp_path)
    for line in ('--comment="two \\"words\\""', '--exclude="n[1-3]"', '--constraint="a&b"', "--exclusive"):
        assert f"#SBATCH {line}\n" in text


def test_what_was_handed_in_is_taken_back_where_a_later_job_is_refused(scheduler, tmp_path):
    scheduler["refuse"] = "second"
    with pytest.raises(UserError, match="Slurm refuses it"):
        launcher.launch(chain(tmp_path), ClusterConfig())
    assert scheduler["cancelled"] == ["1"]
    with pytest.raises(UserError, match="nothing was launched"):
        launcher.status(tmp_path)


def test_secrets_are_demanded_and_kept_from_others(scheduler, tmp_path, monkeypatch):
    cluster = ClusterConfig(secrets=["PROBE_SECRET"])
    with pytest.raises(UserError, match="aren't set in this environment: PROBE_SECRET"):
        launcher.launch(chain(tmp_path), cluster)
    monkeypatch.setenv("PROBE_SECRET", "it's $5")
    launcher.launch(chain(tmp_path), cluster)
    file = tmp_path / "launch" / "secrets.env"
    assert file.stat().st_mode & 0o777 == 0o600
    shown = subprocess.run(["bash", "-c", f". {file}; echo $PROBE_SECRET"], capture_output=True, text=True)
    assert shown.stdout == "it's $5\n"


def test_cancel_leaves_a_mark_for_a_requeue_that_is_under_way(scheduler, tmp_path):
    launcher.launch(chain(tmp_path), ClusterConfig())
    assert launcher.cancel(tmp_path) == ["1", "2"]
    assert scheduler["cancelled"] == ["2", "1"]
    assert (tmp_path / "launch" / "first" / "cancel").exists()
    assert not (tmp_path / "launch" / "secrets.env").exists()
    launcher.launch(replace(chain(tmp_path)), ClusterConfig())
    scheduler["states"] = {"1": "CANCELLED", "2": "CANCELLED"}
    launcher.launch(chain(tmp_path), ClusterConfig())
    assert not (tmp_path / "launch" / "first" / "cancel").exists()


def test_a_damaged_record_of_jobs_is_one_line(tmp_path):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "jobs.json").write_text("{")
    with pytest.raises(UserError, match="jobs.json can't be read"):
        launcher.status(tmp_path)


def test_logs_are_those_of_the_newest_attempt(scheduler, tmp_path):
    launcher.launch(chain(tmp_path), ClusterConfig())
    with pytest.raises(UserError, match="no job of it has begun"):
        launcher.logs(tmp_path, None, 0)
    for number, name in enumerate(("first", "second")):
        file = tmp_path / "launch" / name / "logs" / "attempt_0" / "rank_0.log"
        file.parent.mkdir(parents=True)
        file.write_text("x")
        os.utime(file, (number, number))
    assert launcher.logs(tmp_path, None, 0).parts[-4] == "second"
    assert launcher.logs(tmp_path, "first", 0).parts[-4] == "first"
    with pytest.raises(UserError, match="there is no such run; there are first, second"):
        launcher.logs(tmp_path, "third", 0)


# ---- a node's health


def test_a_healthy_node_has_no_problem(tmp_path):
    assert list(health.problems(tmp_path / "new", 0)) == []


def test_what_makes_a_node_unfit(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "no.such.host.invalid")
    (problem,) = health.problems(tmp_path, 0)
    assert "can't be resolved" in problem
    monkeypatch.delenv("MASTER_ADDR")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 2**20))
    (problem,) = health.problems(tmp_path, 0)
    assert "0.00 GiB left" in problem
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    (problem,) = health.problems(tmp_path / "file", 0)
    assert "can't be written" in problem


@pytest.mark.parametrize(
    "printed, expected",
    [
        ("0, 0\n1, 0\n", []),
        ("0, [N/A]\n1, [N/A]\n", []),
        ("0, 0\n", ["nvidia-smi sees 1 GPUs, the job asked for 2"]),
        ("0, 0\n1, 3\n", ["GPU 1 has 3 uncorrected memory errors since it was started"]),
        (None, ["nvidia-smi fails: driver not loaded"]),
    ],
)
def test_gpus(printed, expected, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + ("echo driver not loaded; exit 9" if printed is None else f"printf '{printed}'"))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert list(health.problems(tmp_path, 2)) == expected


def test_json_of_what_was_handed_in(scheduler, corpus, cli, tmp_path):
    words = [f"data.root={corpus}", "train.global_batch_size=4", f"run_dir={tmp_path / 'run'}"]
    code, out, _ = cli("launch", "tiny/sft", "--cluster", "local", "--json", *words)
    assert code == 0 and json.loads(out) == {"run_dir": str(tmp_path / "run"), "jobs": {"tiny_sft": ["1"]}}
