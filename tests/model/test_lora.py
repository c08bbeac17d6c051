"""LoRA: nothing changes at first, only adapters learn, and merged weights compute what weights and adapters did."""

import pytest
import torch
from megatron_world import make_pack, random_tiles, random_tokens, small_config

from nemo_bluelm.config.schema import (
    Dtype,
    LoraConfig,
    LoraModule,
    ParallelConfig,
    PrecisionConfig,
    Recompute,
    RecomputeConfig,
)
from nemo_bluelm.model.bluelm import BlueLMModel
from nemo_bluelm.model.config import language_transformer_config
from nemo_bluelm.model.init import initialize
from nemo_bluelm.model.lora import add_lora, merge_lora

pytestmark = pytest.mark.usefixtures("world")


def build(lora: LoraConfig | None, recompute: RecomputeConfig | None = None) -> BlueLMModel:
    shape = small_config()
    config = language_transformer_config(shape.language, ParallelConfig(), PrecisionConfig(Dtype.fp32), recompute)
    model = BlueLMModel(config, shape, 4, 512)
    if lora:
        add_lora(model.language, lora)
    initialize(model, shape.language, seed=1)
    return model


@pytest.fixture
def pack():
    return make_pack([[4] * 8 + random_tokens(150, 96, seed=3), random_tokens(90, 96, seed=4)], random_tiles(2, 56, 5))


def rows(model: BlueLMModel, pack) -> torch.Tensor:
    return model(pack, pack.labels) * pack.loss_mask


@pytest.mark.parametrize("modules", [list(LoraModule), [LoraModule.linear_qkv]])
def test_starts_as_the_model_and_merges_into_it(modules, pack):
    model = build(LoraConfig(rank=4, alpha=8, modules=modules))
    assert torch.equal(rows(model, pack), rows(build(None), pack))
    trained = {name for name, weight in model.language.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * len(modules) * model.language.config.num_layers
    assert all(".adapter.linear_" in name for name in trained)
    rows(model, pack).sum().backward()
    assert all((weight.grad is not None) == weight.requires_grad for weight in model.language.parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in {f"language.{one}" for one in trained}:
                weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
    adapted = rows(model, pack)
    assert not torch.allclose(adapted, rows(build(None), pack), rtol=1e-2)
    merge_lora(model.language)
    assert torch.allclose(rows(model, pack), adapted, rtol=1e-5, atol=1e-6)
    assert model.state_dict().keys() == build(None).state_dict().keys()


def test_recomputation_keeps_the_gradients_when_nothing_else_is_trained(pack):
    grads = []
    for recompute in (RecomputeConfig(), RecomputeConfig(language=Recompute.full)):
        model = build(LoraConfig(rank=4), recompute)
        for part in (model.vision, model.projector):
            part.requires_grad_(False)
        rows(model, pack).sum().backward()
        grads.append({name: w.grad for name, w in model.named_parameters() if w.requires_grad})
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())
    assert sum(float(grad.norm()) for grad in grads[0].values()) > 0
