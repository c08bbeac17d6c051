"""FLOPs by arithmetic against what PyTorch counts while the real modules run."""

from itertools import chain, combinations

import pytest
import torch
from hf_weights import randomize
from megatron_world import IMAGE, make_pack, random_tiles, random_tokens, small_config, whole_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nemo_bluelm.config.schema import Activation, LoraConfig, LoraModule, ModelConfig, Part, ProjectorConfig
from nemo_bluelm.model.flops import Flops, pack_flops, peak_flops
from nemo_bluelm.model.lora import add_lora

FROZEN = list(chain.from_iterable(combinations(Part, n) for n in range(3)))


def counted(
    config: ModelConfig, documents: list[list[int]], tiles: torch.Tensor, frozen=(), lora=None
) -> dict[str, int]:
    """FLOPs of one forward and backward as ``FlopCounterMode`` sees them, by kind of operation.

    Attention runs as plain matrix products, so that each is counted once. A mask takes nothing off: causal attention
    is counted as if it were full, twice what ``pack_flops`` says.
    """
    model = whole_model(config)
    if lora:
        add_lora(model.language, lora)
    randomize(model, 0)
    model.freeze(list(frozen))
    pack = make_pack(documents, tiles)
    assert int(pack.cu_seqlens[-1]) == pack.tokens.numel(), "pads would be counted"
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(pack, labels=pack.labels).sum().backward()
    kinds = dict.fromkeys(("patches", "attention", "linear"), 0)
    for operation, flops in counter.get_flop_counts()["Global"].items():
        name = str(operation)
        kinds["patches" if "convolution" in name else "attention" if "bmm" in name else "linear"] += flops
    return kinds


def by_arithmetic(flops: Flops) -> dict[str, int]:
    """In the kinds of :func:`counted`, and with causal attention as that counts it."""
    return {
        "patches": flops.vision_patches,
        "attention": flops.vision_attention + 2 * flops.attention,
        "linear": flops.vision_linear + flops.projector + flops.linear + flops.adapters + flops.output,
    }


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("frozen", FROZEN, ids=lambda parts: "+".join(part.value for part in parts) or "none")
def test_mixed_pack_with_frozen_parts(frozen):
    config = small_config(tile=42, num_attention_heads=6, kv_channels=12)  # 6 * 12 is not the hidden size
    image = [IMAGE] * (4 * 3) + random_tokens(24, 96, 0)  # three tiles of four tokens
    documents = [image, random_tokens(40, 96, 1), random_tokens(16, 96, 2)]
    found = counted(config, documents, random_tiles(3, 42, 0), frozen)
    assert found == by_arithmetic(pack_flops(config, [36, 40, 16], 3, frozen))


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("frozen", [(), (Part.vision,), (Part.vision, Part.projector), (Part.projector,)], ids=len)
@pytest.mark.parametrize("norm", [True, False])
def test_gated_projector(norm, frozen):
    config = small_config(projector=ProjectorConfig(norm, Activation.swiglu))
    documents = [[IMAGE] * (4 * 3) + random_tokens(24, 96, 0)]
    found = counted(config, documents, random_tiles(3, 56, 0), frozen)
    assert found == by_arithmetic(pack_flops(config, [36], 3, frozen))


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("frozen", [(), (Part.vision,), (Part.vision, Part.projector)], ids=len)
@pytest.mark.parametrize("modules", [list(LoraModule), *([module] for module in LoraModule)], ids=lambda m: m[-1].value)
def test_lora(modules, frozen):
    """No weight beside an adapter has a gradient, and nothing below the first trained one."""
    config, lora = small_config(tile=42), LoraConfig(rank=3, modules=modules)
    documents = [[IMAGE] * (4 * 3) + random_tokens(24, 96, 0), random_tokens(40, 96, 1)]
    found = counted(config, documents, random_tiles(3, 42, 0), frozen, lora)
    assert found == by_arithmetic(pack_flops(config, [36, 40], 3, frozen, lora))


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("tied", [True, False])
def test_text_only(tied):
    config = small_config(share_embeddings_and_output_weights=tied)
    found = counted(config, [random_tokens(64, 96, 0)], torch.empty(0, 3, 56, 56, dtype=torch.uint8))
    flops = pack_flops(config, [64], 0)
    assert found == by_arithmetic(flops)
    assert flops.vision == 0


def test_without_images_nothing_below_the_language_model_learns():
    assert pack_flops(ModelConfig(), [64], 0, [Part.language]).total * 3 == pack_flops(ModelConfig(), [64], 0).total


def test_published_shape():
    model = ModelConfig()
    assert pack_flops(model, [4096], 0).total / 4096 == pytest.approx(16.76e9, rel=1e-3)
    assert pack_flops(model, [8192], 0).total / 8192 == pytest.approx(18.78e9, rel=1e-3)
    tile = pack_flops(model, [], 1)
    assert tile.vision_linear + tile.vision_attention == pytest.approx(1996e9, rel=1e-3)


def test_parts_add_up_and_what_is_not_real_is_not_counted():
    config = small_config()
    whole = pack_flops(config, [7, 0, 21], 2)
    assert whole == pack_flops(config, [7], 2) + pack_flops(config, [21], 0)
    assert whole.total == sum(value for name, value in whole.to_dict().items() if name != "total")


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce GTX 1080", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_peak(name, peak):
    assert peak_flops(name) == peak
