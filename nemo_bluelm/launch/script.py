"""The batch script of a job, to be read by the person who debugs it at night."""

import re
import shlex
import sys
from pathlib import Path

from nemo_bluelm.children import python_environment
from nemo_bluelm.errors import UserError
from nemo_bluelm.launch.cluster import ClusterConfig, GpuRequest, Resume
from nemo_bluelm.launch.jobs import Job, Plan, Unit

SCRIPT, TASK, LOGS, SECRETS = "job.sbatch", "task.sh", "logs", "secrets.env"
_ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron-Core orders communication and products by it
    "NCCL_DEBUG": "WARN",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
}
# Known to the container only when named.
_JOB_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NEMO_BLUELM_STOP_FILE", "NEMO_BLUELM_CONTROL")


def script_of(job: Job, plan: Plan, cluster: ClusterConfig, folder: Path) -> str:
    """The text of a job's ``job.sbatch``.

    Args:
        folder: that jobs run in, for relative paths of the recipe.
    """
    jinja = _jinja()
    environment = {**_ENVIRONMENT, **({} if cluster.container.image else python_environment()), **cluster.env}
    run = [
        f"--nodes={job.nodes}",
        f"--ntasks={job.nodes * job.tasks}",
        f"--ntasks-per-node={job.tasks}",
        "--kill-on-bad-exit=1",  # or the ranks that wait for the one that is gone would be waited for
        "--wait=60",
        '--output="$LOGS/rank_%t.log"',
        *([f"--mpi={cluster.mpi}"] if cluster.mpi else []),
        *cluster.srun_extra,
    ]
    container = _container(cluster, folder, [*_JOB_VARIABLES, *environment, *cluster.secrets])
    health = cluster.health_check
    if health == "default":
        health = f"{shlex.quote(_python(cluster))} -m nemo_bluelm.launch.health {shlex.quote(str(plan.root))}"
        health += f" --gpus {cluster.gpus_per_node if cluster.gpu_request is not GpuRequest.none else 0}"
    units = [
        {"control": str(job.control_of(number)), "folder": str(unit.folder), "marker": str(unit.marker)}
        for number, unit in enumerate(job.units)
    ]
    return jinja.get_template("job.sbatch.j2").render(
        title=f"{plan.name}: {job.name}",
        script=str(job.control / SCRIPT),
        directives=_directives(job, plan, cluster, folder),
        runs=units,
        cluster=cluster,
        resume=cluster.resume.value,
        environment=environment,
        secrets=str(secrets_file(plan)) if cluster.secrets else "",
        health_check=health,
        srun=run,
        srun_container="".join(f" \\\n    {flag}" for flag in container),
    )


def task_of(unit: Unit, cluster: ClusterConfig) -> str:
    """The text of a run's ``task.sh``, which srun starts for every rank."""
    command = shlex.join([_python(cluster), "-m", "nemo_bluelm.cli.main", *unit.command])
    single = unit.command[0] != "train"
    ranks = "export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS"
    return "\n".join(
        [
            "#!/bin/bash",
            "# One rank. SLURM_NTASKS_PER_NODE is that of the step.",
            *([] if single else [f"{ranks} LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE"]),
            f"exec {command}",
            "",
        ]
    )


def secrets_file(plan: Plan) -> Path:
    """Where the values of ``secrets`` are, readable by their owner alone."""
    return plan.root / "launch" / SECRETS


def _directives(job: Job, plan: Plan, cluster: ClusterConfig, folder: Path) -> dict[str, object]:
    array = len(job.units) > 1
    found: dict[str, object] = {
        "job-name": f"{plan.name}.{job.name}" if job.name != plan.name else plan.name,
        "nodes": job.nodes,
        "ntasks-per-node": job.tasks,
    }
    if cluster.gpus_per_node and cluster.gpu_request is GpuRequest.gpus_per_node:
        found["gpus-per-node"] = cluster.gpus_per_node
    elif cluster.gpus_per_node and cluster.gpu_request is GpuRequest.gres:
        found["gres"] = f"gpu:{cluster.gpus_per_node}"
    for key in ("partition", "account", "qos", "reservation", "constraint", "exclude", "cpus_per_task", "mem", "time"):
        if (value := getattr(cluster, key)) is not None:
            found[key.replace("_", "-")] = value
    if cluster.exclusive:
        found["exclusive"] = True
    if array:
        found["array"] = f"0-{len(job.units) - 1}"
    found["requeue" if cluster.resume is Resume.requeue else "no-requeue"] = True
    found["chdir"] = str(folder)
    found["signal"] = f"B:USR1@{cluster.warn_before}"  # to this script; when the ranks are told is its business
    found["open-mode"] = "append"
    log = "%a/slurm_%A.log" if array else "slurm_%j.log"
    found["output"] = f"{str(job.control).replace('%', '%%')}/{log}"
    found["export"] = "NONE"
    found |= cluster.sbatch_extra
    return {flag: value if value is True else _directive(str(value)) for flag, value in found.items()}


def _directive(text: str) -> str:
    """A value that sbatch reads whole; it knows quotes, but expands nothing."""
    return text if re.fullmatch(r"[\w./%+,:=@-]+", text) else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _container(cluster: ClusterConfig, folder: Path, variables: list[str]) -> list[str]:
    config = cluster.container
    if config.image is None:
        return []
    return [
        f"--container-image={shlex.quote(config.image)}",
        f"--container-mounts={shlex.quote(','.join(config.mounts))}",
        "--container-mount-home" if config.mount_home else "--no-container-mount-home",
        f"--container-workdir={shlex.quote(config.workdir or str(folder))}",
        f"--container-env={','.join(dict.fromkeys(variables))}",
        *(["--container-writable"] if config.writable else []),
        *([f"--container-name={shlex.quote(config.name)}"] if config.name else []),
        *config.extra,
    ]


def _python(cluster: ClusterConfig) -> str:
    return cluster.container.python if cluster.container.image else sys.executable


def _jinja():
    try:
        import jinja2
    except ImportError:
        raise UserError("launch needs jinja2; pip install 'nemo-bluelm[launch]'") from None
    jinja = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    jinja.filters["q"] = shlex.quote
    return jinja
