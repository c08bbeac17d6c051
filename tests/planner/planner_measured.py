"""What was measured of our own model on a GPU: one run each, times are medians of 10 steps."""

from typing import NamedTuple, Optional

from nemo_bluelm.config.schema import Fp8Recipe

DEVICE = "h200"  # one NVIDIA H200, 139.8 GiB
VERSIONS = {"torch": "2.11.0+cu130", "transformer_engine": "2.9.0", "megatron-core": "0.15.3"}


class TextStep(NamedTuple):
    """A step of text, each pack one document; full model, ViT and projector frozen but there.

    Transformer Engine's layers with ``layers.te.FusedMLP``, its cross entropy, gradients accumulated by the matrix
    products, distributed optimizer of one GPU.
    """

    fp8: Optional[Fp8Recipe]
    packs: int  # in a micro-batch
    graphs: bool  # train.cuda_graphs
    allocated: Optional[float]  # GiB at the peak; says nothing with CUDA graphs, whose pools aren't counted
    reserved: float  # GiB at the peak
    milliseconds: Optional[float]  # of 65,536 tokens; None where only the memory is still that of our layers
    length: int = 4096  # tokens of a pack


TEXT_STEPS = [
    TextStep(None, 4, True, None, 88.8, 1979),
    TextStep(Fp8Recipe.current, 4, True, None, 90.4, 1547),
    TextStep(Fp8Recipe.current, 2, True, None, 90.4, 1829, length=8192),
    TextStep(None, 1, False, 121.8, 125.7, 3865, length=32768),
    TextStep(None, 4, False, 82.3, 85.4, None),
    TextStep(None, 2, False, 62.5, 65.2, None),
    TextStep(None, 2, True, None, 67.7, None),
    TextStep(Fp8Recipe.current, 4, False, 81.8, 87.5, None),
    TextStep(Fp8Recipe.delayed, 4, False, 83.0, 88.9, None),
    TextStep(Fp8Recipe.current, 2, True, None, 70.5, None),
]

# The first row's kernels, in milliseconds; profiled on another machine of the kind. "optimizer": Adam 20.5, gradients
# zeroed, divided, clipped and summed up 18, weights copied 3.7.
KERNELS = {"matrix products": 1404, "attention": 372, "optimizer": 42, "in all": 2016}

# ViT and projector alone, BF16, forward and backward, fp32 gradient buffers but no optimizer: tiles -> GiB allocated.
# Another 2.3 GiB, left by a model before, may be in the second; not in both, or less than the weights would be left for
# no tiles.
VISION_ALLOCATED = {32: 24.1, 64: 45.4}
VISION_MILLISECONDS = {None: 290.7, Fp8Recipe.current: 255.9}  # of 64 tiles; FP8: half of 128 tiles' time

# Everything trained, CUDA graphs, micro-batches of two packs of 4,096 tokens, photos of up to 13 tiles and text of all
# lengths: GiB reserved at the peak (bench/figures_h200.json). A pack holds 20 tiles at most.
MIXED_RESERVED = {None: 109.0, Fp8Recipe.current: 113.9}

# Everything trained, BF16, a micro-batch of 16,384 tokens with up to 80 tiles: out of memory.
TOO_LARGE = {"tokens": 16384, "tiles": 80}
