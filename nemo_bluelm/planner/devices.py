"""The GPUs that the planner knows, and what it assumes of the network between them."""

from dataclasses import dataclass

from nemo_bluelm.config.schema import Fp8Recipe
from nemo_bluelm.errors import UserError
from nemo_bluelm.model.flops import peak_flops

GPUS_PER_NODE = 8  # HGX and DGX boards


@dataclass(frozen=True)
class Device:
    """One kind of GPU, in nodes of eight with a network card each.

    Attributes:
        name: as NVIDIA calls it; looked up in the table of peak rates.
        memory: GiB that CUDA reports in all.
        hbm: bytes/s of its memory.
        nvlink: bytes/s to the other GPUs of its node, one direction.
        network: bytes/s of its network card, one direction.
        fp8: scalings that its tensor cores can do with Transformer Engine.
    """

    name: str
    memory: float
    hbm: float
    nvlink: float
    network: float
    fp8: frozenset[Fp8Recipe]

    @property
    def peak(self) -> float:
        """Dense BF16 FLOP/s."""
        return peak_flops(self.name)


_ALL, _NONE = frozenset(Fp8Recipe), frozenset()
# Memory as nvidia-smi reports it; HBM and NVLink (half of the printed sum of both directions) from the data sheets of
# the SXM boards; network from the DGX of that generation: HDR InfiniBand 200 Gb/s a GPU (A100), NDR 400 Gb/s (later).
DEVICES = {
    "a100_40": Device("NVIDIA A100 40GB", 39.4, 1.555e12, 300e9, 25e9, _NONE),
    "a100": Device("NVIDIA A100 80GB", 79.2, 2.039e12, 300e9, 25e9, _NONE),
    "h100": Device("NVIDIA H100 80GB HBM3", 79.2, 3.35e12, 450e9, 50e9, _ALL),
    "h200": Device("NVIDIA H200", 139.8, 4.8e12, 450e9, 50e9, _ALL),
    "b200": Device("NVIDIA B200", 178.3, 8e12, 900e9, 50e9, _ALL),
}


def find_device(name: str) -> Device:
    """
    Raises:
        UserError: the planner doesn't know it.
    """
    if name not in DEVICES:
        raise UserError(f"--device is {name}; it must be one of {', '.join(DEVICES)}")
    return DEVICES[name]
