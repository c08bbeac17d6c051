"""What a cluster is like: a YAML file beside the recipes, checked like them."""

import dataclasses
import difflib
import os
import re
import typing
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Dict, List, Optional

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_bluelm import resources
from nemo_bluelm.errors import UserError


class GpuRequest(Enum):
    """How a job asks for GPUs; ``none`` where nodes are given out whole, or have none."""

    gpus_per_node = "gpus_per_node"
    gres = "gres"
    none = "none"


class Resume(Enum):
    """How a run goes on after its job: by the same job again, by the next job of a chain, not at all."""

    requeue = "requeue"
    chain = "chain"
    none = "none"


@dataclass
class ContainerConfig:
    """Pyxis: flags of srun that run each task in a container."""

    image: Optional[str] = None  # a .sqsh file, or an address that enroot imports; null: no container
    mounts: List[str] = field(default_factory=list)  # /host/path:/path/inside[:flags]
    workdir: Optional[str] = None  # null: the folder that launch was called in
    mount_home: bool = False
    writable: bool = True
    name: Optional[str] = None  # keep it on the node under this name
    python: str = "python"  # inside
    extra: List[str] = field(default_factory=list)  # further --container-* flags


@dataclass
class ClusterConfig:
    """Where and how jobs run."""

    nodes: int = 1
    gpus_per_node: int = 8
    tasks_per_node: Optional[int] = None  # ranks; null: one for each GPU, or one
    gpu_request: GpuRequest = GpuRequest.gpus_per_node
    partition: Optional[str] = None
    account: Optional[str] = None
    qos: Optional[str] = None
    reservation: Optional[str] = None
    constraint: Optional[str] = None
    exclude: Optional[str] = None  # nodes
    cpus_per_task: Optional[int] = None
    mem: Optional[str] = "0"  # of a node; "0" is all of it
    exclusive: bool = True
    time: str = "04:00:00"  # of a job; a run goes on in the next
    max_time: Optional[str] = None  # that the cluster allows
    mpi: Optional[str] = None  # srun's --mpi where the cluster's default isn't right
    resume: Resume = Resume.requeue
    chain_length: int = 8  # jobs, where resume is chain
    max_restarts: int = 3  # after crashes
    max_stalls: int = 2  # attempts in a row that began at the same step
    warn_before: int = 300  # seconds before a job's limit at which the run saves and ends
    health_check: Optional[str] = "default"  # a shell command for each node before a job; null: none
    port_base: int = 20000  # MASTER_PORT lies in the port_span ports from here
    port_span: int = 10000
    container: ContainerConfig = field(default_factory=ContainerConfig)
    env: Dict[str, str] = field(default_factory=dict)
    secrets: List[str] = field(default_factory=list)  # variables of your environment that jobs get, in no readable file
    setup: List[str] = field(default_factory=list)  # shell lines before the run, such as module load
    srun_extra: List[str] = field(default_factory=list)
    sbatch_extra: Dict[str, str] = field(default_factory=dict)

    @property
    def tasks(self) -> int:
        """Ranks on a node."""
        return self.tasks_per_node if self.tasks_per_node is not None else max(1, self.gpus_per_node)


def load_cluster(name: str) -> ClusterConfig:
    """Read a cluster file.

    Args:
        name: the file, or the name of one in ``conf/cluster``.

    Raises:
        UserError: no such file; what is wrong in it, in one line.
    """
    file = _find(name)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--cluster {name} can't be read: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if getattr(error, "problem_mark", None) else ""
        raise UserError(f"--cluster {name}: {line}not valid YAML") from error
    content = {} if content is None else content
    _check_keys(content, ClusterConfig, name, "")
    if isinstance(content.get("time"), int) or isinstance(content.get("max_time"), int):
        key = "time" if isinstance(content.get("time"), int) else "max_time"
        raise UserError(f'--cluster {name}: {key} is read as the number {content[key]}; write it in quotes: "04:00:00"')
    try:
        merged = OmegaConf.merge(OmegaConf.structured(ClusterConfig), content)
        cluster = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        first = str(error).split("\n", 1)[0]
        raise UserError(f"--cluster {name}: {getattr(error, 'full_key', '') or ''}: {first}") from error
    for problem in _problems(cluster):
        raise UserError(f"--cluster {name}: {problem}")
    return cluster


def seconds(time: str) -> Optional[int]:
    """A time limit as Slurm writes it (minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS); None if it is none."""
    days, _, rest = time.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdecimal() for part in parts) or ("-" in time and not days.isdecimal()) or len(parts) > 3:
        return None
    numbers = [int(part) for part in parts]
    if days:
        hours, minutes, secs = (numbers + [0, 0])[:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + secs
    if len(numbers) == 1:
        return numbers[0] * 60
    hours, minutes, secs = ([0] + numbers)[-3:]
    return (hours * 60 + minutes) * 60 + secs


def _find(name: str) -> Path:
    path, folder = Path(name), resources.conf_dir() / "cluster"
    if path.is_file():
        return path
    packaged = sorted(file.stem for file in folder.glob("*.yaml"))
    if name.removesuffix(".yaml") in packaged:
        return folder / f"{name.removesuffix('.yaml')}.yaml"
    close = difflib.get_close_matches(name, packaged, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UserError(f"--cluster {name}: no such file; {hint}packaged ones, to copy and fill in: {', '.join(packaged)}")


def _check_keys(content: object, cls: type, name: str, prefix: str) -> None:
    if not isinstance(content, dict):
        what = f"{prefix.rstrip('.')} must be" if prefix else "a cluster is"
        raise UserError(f"--cluster {name}: {what} a mapping of keys, this is {content!r}")
    kinds = typing.get_type_hints(cls)
    for key, value in content.items():
        if key not in kinds:
            close = difflib.get_close_matches(str(key), kinds, 1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"there are {', '.join(kinds)}"
            raise UserError(f"--cluster {name}: unknown key {prefix}{key}; {hint}")
        if dataclasses.is_dataclass(kinds[key]):
            _check_keys(value, kinds[key], name, f"{prefix}{key}.")


def _problems(cluster: ClusterConfig) -> typing.Iterator[str]:
    for key, least in (("nodes", 1), ("gpus_per_node", 0), ("chain_length", 1), ("max_restarts", 0), ("max_stalls", 0)):
        if getattr(cluster, key) < least:
            yield f"{key} is {getattr(cluster, key)}; it must be {least} or more"
    if cluster.tasks < 1:
        yield f"tasks_per_node is {cluster.tasks_per_node}; it must be 1 or more"
    limit = seconds(cluster.time)
    if not limit:
        yield f"time is {cluster.time!r}, no time limit; write minutes, HH:MM:SS or D-HH:MM:SS"
    if cluster.max_time is not None:
        most = seconds(cluster.max_time)
        if not most:
            yield f"max_time is {cluster.max_time!r}, no time limit; write minutes, HH:MM:SS or D-HH:MM:SS"
        elif limit > most:
            yield f"time {cluster.time} is over max_time {cluster.max_time}; a longer run goes on in the next job"
    if limit and cluster.warn_before >= limit:
        yield f"warn_before is {cluster.warn_before} s, which leaves nothing of time {cluster.time}"
    if cluster.warn_before < 0:
        yield f"warn_before is {cluster.warn_before}; it must be 0 or more"
    if not (1024 <= cluster.port_base and 1 <= cluster.port_span and cluster.port_base + cluster.port_span <= 65536):
        yield f"port_base {cluster.port_base} and port_span {cluster.port_span} must stay between 1024 and 65535"
    container = cluster.container
    if container.mounts and container.image is None:
        yield "container.mounts are set, but container.image is null"
    for mount in container.mounts:
        if not re.fullmatch(r"/[^:]*:/[^:]*(:[^:]*)?", mount):
            yield f"container.mounts has {mount!r}; a mount is /host/path:/path/inside, or with :flags"
    for variable in cluster.env:
        if re.search(r"TOKEN|SECRET|PASSW|API_KEY", variable):
            yield f"env.{variable} looks like a secret, and env is written into scripts; name it in secrets instead"
        if not re.fullmatch(r"[A-Za-z_]\w*", variable):
            yield f"env.{variable} is no name of a variable"
    for variable in cluster.secrets:
        if not re.fullmatch(r"[A-Za-z_]\w*", variable):
            yield f"secrets has {variable!r}, which is no name of a variable"


def check_mounted(cluster: ClusterConfig, folder: Path) -> None:
    """Refuse a container that would take a run's folder with it when it ends.

    Raises:
        UserError: the folder isn't mounted at its own path.
    """
    if cluster.container.image is None:
        return
    for mount in cluster.container.mounts:
        outside, inside, *_ = mount.split(":")
        if outside.rstrip("/") == inside.rstrip("/") and Path(outside) in (folder, *folder.parents):
            return
    raise UserError(
        f"container.mounts has no mount of {folder} at its own path, so its checkpoints would vanish with the "
        f"container; add {folder.parent}:{folder.parent}"
    )


def missing_secrets(cluster: ClusterConfig) -> list[str]:
    """Secrets that this environment lacks."""
    return [name for name in cluster.secrets if name not in os.environ]
