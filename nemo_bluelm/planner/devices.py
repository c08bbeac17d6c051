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
        memory: GiB that CUDA reports in all, and PyTorch as "total capacity".
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
# Memory: total capacity in PyTorch's messages; it varies by some tenths with driver and ECC, and the least is here. HBM
# and NVLink (half of the printed sum of both directions): NVIDIA's data sheets of the SXM boards. Network: the DGX of
# that generation, HDR InfiniBand of 200 Gb/s a GPU (A100), NDR of 400 Gb/s (later). BF16 peaks: model.flops.
DEVICES = {
    # 39.39 to 39.56 GiB; A100 data sheet, 40GB SXM: 1,555 GB/s, NVLink 600 GB/s.
    "a100_40": Device("NVIDIA A100 40GB", 39.4, 1.555e12, 300e9, 25e9, _NONE),
    # 79.1 to 79.3 GiB; A100 data sheet, 80GB SXM: 2,039 GB/s, NVLink 600 GB/s, BF16 312 TFLOP/s.
    "a100": Device("NVIDIA A100 80GB", 79.1, 2.039e12, 300e9, 25e9, _NONE),
    # 79.1 to 79.2 GiB; H100 data sheet, SXM: 3.35 TB/s, NVLink 900 GB/s; BF16 989.4 TFLOP/s dense in the white paper
    # "NVIDIA H100 Tensor Core GPU Architecture" (the data sheet has 1,979 with sparsity).
    "h100": Device("NVIDIA H100 80GB HBM3", 79.1, 3.35e12, 450e9, 50e9, _ALL),
    # 139.8 GiB, measured; H200 data sheet, SXM: 4.8 TB/s, NVLink 900 GB/s, BF16 1,979 TFLOP/s with sparsity as H100's.
    "h200": Device("NVIDIA H200", 139.8, 4.8e12, 450e9, 50e9, _ALL),
    # 178.35 GiB; data sheets of eight: 64 TB/s, NVLink 14.4 TB/s (DGX B200), BF16 36 PFLOP/s with sparsity (HGX B200).
    "b200": Device("NVIDIA B200", 178.3, 8e12, 900e9, 50e9, _ALL),
}


def find_device(name: str) -> Device:
    """
    Raises:
        UserError: the planner doesn't know it.
    """
    if name not in DEVICES:
        raise UserError(f"--device is {name or 'empty'}; it must be one of {', '.join(DEVICES)}")
    return DEVICES[name]
