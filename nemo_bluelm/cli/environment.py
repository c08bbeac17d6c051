"""Looks at the machine and its packages without importing the heavy ones into this process."""

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass

# Seconds; a first import of a large package from a slow disk can take most of it.
_PROBE_TIMEOUT = 120

_TORCH_PROBE = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "version": torch.__version__,
    "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    "cuda": torch.version.cuda,
    "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() and cuda else None,
}))
"""


@dataclass
class Item:
    """One line of the report."""

    name: str
    version: str | None
    state: str  # ok | missing | broken | unsupported
    note: str
    required: bool
    used_for: str

    def as_json(self) -> dict:
        row = asdict(self)
        row["for"] = row.pop("used_for")
        return row


# Distributions (the first that is installed counts), required, what for, module to import as a trial. Packages
# compiled against torch, numpy or CUDA get a trial, for they break when that changes; the others are judged by their
# version.
_PACKAGES = [
    (("nemo-toolkit", "nemo_toolkit"), True, "trainer, strategy, checkpoints", None),
    (("megatron-core",), True, "model, parallelism, optimizer", None),
    (("pyarrow",), True, "index of the data", "pyarrow.ipc"),
    (("transformer-engine",), False, "fused layers and attention, FP8 (GPU)", "transformer_engine.pytorch"),
    (("apex",), False, "fused kernels where Transformer Engine is absent (GPU)", "apex.optimizers"),
    (("nvidia-dali-cuda130", "nvidia-dali-cuda120"), False, "image decoding", "nvidia.dali"),
    (("nvidia-modelopt",), False, "pruning, quantised export", None),
    (("datatrove",), False, "curation", None),
    (("starlette",), False, "serve: what it answers", None),
    (("uvicorn",), False, "serve: HTTP", None),
    (("math-verify",), False, "eval: the scorer math", None),
    (("rapidfuzz",), False, "eval: the scorer anls", None),
    (("httpx",), False, "eval: the scorer judge asks its endpoint", None),
    (("lm-eval",), False, "our model in lm-evaluation-harness", None),
]
# Packages that one line adds, by what that is for.
_TOGETHER = {
    "serve": ("starlette", "uvicorn"),
    "eval, the scorers math, anls and judge": ("math-verify", "rapidfuzz", "httpx"),
    "lm-evaluation-harness": ("lm-eval",),
}


def examine() -> dict:
    """The report: ``installed``, ``used``, ``add`` (pip lines), ``ready``; JSON-ready."""
    items = [Item("python", platform.python_version(), *_python_state(), True, "")]
    torch, torch_note = _probe(_TORCH_PROBE)
    items.append(_torch_item(torch, torch_note))
    items += [_package(*row) for row in _PACKAGES]
    state = {item.name: item.state for item in items}
    devices = torch["devices"] if torch else []
    items.append(
        Item(
            "CUDA device",
            f"CUDA {torch['cuda']}" if devices else None,
            "ok" if devices else "missing",
            ", ".join(f"{devices.count(d)} x {d}" for d in dict.fromkeys(devices)),
            False,
            "training at full scale",
        )
    )
    nccl = torch["nccl"] if torch else None
    items.append(Item("NCCL", nccl, "ok" if nccl else "missing", "", False, "collectives between GPUs"))
    items.append(_slurm())
    return {
        "installed": [item.as_json() for item in items],
        "used": _used(state, bool(devices)),
        "add": _add(state, torch),
        "ready": all(item.state == "ok" for item in items if item.required),
    }


def _python_state() -> tuple[str, str]:
    if (3, 10) <= sys.version_info[:2] <= (3, 12):
        return "ok", ""
    return "unsupported", "3.10 to 3.12 are supported"


def _torch_item(found: dict | None, note: str) -> Item:
    version = _version("torch")
    if version is None:
        return Item("torch", None, "missing", "", True, "tensors")
    if found is None:
        return Item("torch", version, "broken", note, True, "tensors")
    return Item("torch", found["version"], *_range_state("torch", version), True, "tensors")


def _package(names: tuple[str, ...], required: bool, used_for: str, trial: str | None) -> Item:
    name, version = next(((n, v) for n in names if (v := _version(n))), (names[0], None))
    if version is None:
        return Item(names[0], None, "missing", "", required, used_for)
    if trial:
        _, note = _probe(f"import {trial}; print('{{}}')")
        if note:
            return Item(names[0], version, "broken", note, required, used_for)
    return Item(names[0], version, *_range_state(name, version), required, used_for)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    except Exception:  # damaged metadata of one package must not hide all others
        return None


def _range_state(name: str, version: str) -> tuple[str, str]:
    """State by the version range that this project asks for; ok where it names none or is not installed itself."""
    requirement = _requirements().get(name.replace("_", "-"))
    if requirement is not None and not requirement.specifier.contains(version, prereleases=True):
        return "unsupported", f"{requirement.specifier} is supported"
    return "ok", ""


def _requirements() -> dict:
    """This project's requirements, those of its extras too, by name; none where it is not installed itself."""
    try:
        from packaging.requirements import Requirement

        lines = importlib.metadata.requires("nemo-bluelm") or []
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return {}
    requirements = map(Requirement, lines)
    return {requirement.name: requirement for requirement in requirements}


def _probe(code: str) -> tuple[dict | None, str]:
    """(JSON that ``code`` prints last, "") from another process, or (None, its last error line)."""
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=_PROBE_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return None, f"import took more than {_PROBE_TIMEOUT} s"
    if done.returncode == 0:
        try:
            return json.loads(done.stdout.strip().splitlines()[-1]), ""
        except (ValueError, IndexError):
            return None, "import printed nothing that could be read"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return None, lines[-1].strip() if lines else f"import ended with code {done.returncode}"


def _slurm() -> Item:
    if not shutil.which("sbatch"):
        return Item("Slurm", None, "missing", "", False, "jobs on a cluster")
    try:
        done = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, timeout=10)
        version = done.stdout.strip().removeprefix("slurm ")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Item("Slurm", None, "broken", str(error), False, "jobs on a cluster")
    if done.returncode or not version:
        return Item("Slurm", None, "broken", done.stderr.strip().split("\n")[-1], False, "jobs on a cluster")
    return Item("Slurm", version, "ok", "", False, "jobs on a cluster")


def _used(state: dict[str, str], gpu: bool) -> list[dict]:
    """Which implementation each part of a training step uses here, and why; the choice is in ``model.config``."""
    engine, apex = state["transformer-engine"], state["apex"]
    te, with_apex = engine == "ok" and gpu, apex == "ok" and gpu
    installed = "Transformer Engine is " + ("installed" if engine == "ok" else engine)
    layers = installed if gpu else "no CUDA device"
    instead = f"{layers}, apex is {'installed' if apex == 'ok' else apex}" if gpu else layers

    def choice(with_te: str, otherwise: str, with_apex_only: str = "") -> tuple[str, str]:
        if te:
            return f"Transformer Engine {with_te}", layers
        return (f"apex {with_apex_only}", instead) if with_apex_only and with_apex else (otherwise, instead)

    dali = "installed" if state["nvidia-dali-cuda130"] == "ok" else state["nvidia-dali-cuda130"]
    rows = [
        ("attention", *choice("fused attention (cuDNN) on packs", "torch SDPA, packs by cu_seqlens")),
        ("RoPE", *choice("fused RoPE on packs", "Megatron-Core")),
        ("norm", *choice("norm fused with the linear layer", "torch")),
        ("MLP", *choice("LayerNormMLP", "Megatron-Core")),
        ("FP8", *choice("delayed, current or blockwise scaling", "none; a recipe that asks for it is refused")),
        ("cross-entropy", *choice("cross-entropy", "Megatron-Core")),
        ("weight gradients", *choice("added up in the product", "added up by autograd", "added up in the product")),
        ("optimizer", *choice("FusedAdam", "torch AdamW", "FusedAdam")),
        ("image decoding", "torch on the CPU, or as data.decode says", f"DALI is {dali}"),
        ("collectives", "NCCL" if gpu else "gloo", "a CUDA device is here" if gpu else "no CUDA device"),
        ("device", "CUDA" if gpu else "CPU, through the adapter", "a CUDA device is here" if gpu else "no CUDA device"),
    ]
    return [{"for": name, "what": what, "because": why} for name, what, why in rows]


def _add(state: dict[str, str], torch: dict | None) -> list[dict]:
    lines = []
    for name in ("torch", "nemo-toolkit", "megatron-core", "pyarrow"):
        if state[name] != "ok":
            lines.append({"for": f"{name}, required", "command": f"pip install '{_requirements().get(name, name)}'"})
    if state["transformer-engine"] != "ok":
        lines.append(
            {
                "for": "Transformer Engine, on a machine with a CUDA toolkit",
                "command": "pip install --no-build-isolation 'transformer-engine[pytorch]>=2.9,<2.10'",
            }
        )
    if state["nvidia-dali-cuda130"] != "ok":
        cuda = (torch or {}).get("cuda") or ""
        lines.append(
            {"for": "DALI", "command": f"pip install nvidia-dali-cuda{'120' if cuda.startswith('12') else '130'}"}
        )
    if state["nvidia-modelopt"] != "ok":
        lines.append({"for": "ModelOpt", "command": "pip install 'nvidia-modelopt==0.37.*'"})
    if state["datatrove"] != "ok":
        lines.append({"for": "datatrove", "command": "pip install 'datatrove==0.3.*'"})
    for what, names in _TOGETHER.items():
        if lacking := [name for name in names if state[name] != "ok"]:
            # Requirements of extras have a marker, which isn't pip's.
            wanted = " ".join(f"'{str(_requirements().get(name, name)).partition(';')[0]}'" for name in lacking)
            lines.append({"for": what, "command": f"pip install {wanted}"})
    return lines
