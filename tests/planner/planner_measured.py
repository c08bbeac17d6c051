"""What was measured of our own model on a GPU: one run each, times are medians of 9 or 11 steps."""

from typing import NamedTuple, Optional

from nemo_bluelm.config.schema import Fp8Recipe

DEVICE = "h200"  # one NVIDIA H200, 139.8 GiB
VERSIONS = {"torch": "2.11.0+cu130", "transformer_engine": "2.9.0", "megatron-core": "0.15.3"}


class TextStep(NamedTuple):
    """A step of 8 packs, each one document of 4,096 tokens of text; full model, ViT and projector frozen but there.

    Transformer Engine's layers with ``layers.te.FusedMLP``, its cross entropy, gradients accumulated by the matrix
    products, distributed optimizer of one GPU. FP8 rows with cuDNN's norms, BF16 rows with Transformer Engine's.
    """

    fp8: Optional[Fp8Recipe]
    packs: int  # in a micro-batch
    graphs: bool  # train.cuda_graphs
    allocated: Optional[float]  # GiB at the peak; says nothing with CUDA graphs, whose pools aren't counted
    reserved: float  # GiB at the peak
    milliseconds: float


TEXT_STEPS = [
    TextStep(None, 4, False, 82.3, 85.4, 1102),
    TextStep(None, 2, False, 62.5, 65.2, 1131),
    TextStep(None, 2, True, None, 67.7, 1118),
    TextStep(Fp8Recipe.current, 4, False, 81.8, 87.5, 991),
    TextStep(Fp8Recipe.delayed, 4, False, 83.0, 88.9, 953),
    TextStep(Fp8Recipe.current, 2, True, None, 70.5, 908),
]

# The first row's kernels, in milliseconds; profiled on another machine of the kind.
KERNELS = {"matrix products": 660, "attention": 176, "norms": 14, "Adam": 21, "in all": 1022}

# ViT and projector alone, BF16, forward and backward, fp32 gradient buffers but no optimizer: tiles -> GiB allocated.
# Another 2.3 GiB, left by a model before, may be in the second; not in both, or less than the weights would be left for
# no tiles.
VISION_ALLOCATED = {32: 24.1, 64: 45.4}
VISION_MILLISECONDS = {None: 325, Fp8Recipe.current: 323}  # of 64 tiles; delayed, which recipes can't ask for, 297

# Everything trained, BF16, a micro-batch of 16,384 tokens with up to 80 tiles: out of memory.
TOO_LARGE = {"tokens": 16384, "tiles": 80}
