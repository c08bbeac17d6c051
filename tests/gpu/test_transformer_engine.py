"""On a GPU: the Transformer Engine spec computes what the local spec computes, and a recipe trains with it."""

import os
from dataclasses import replace
from itertools import islice

import pytest
import torch

from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.config.schema import Dtype, ParallelConfig, PrecisionConfig
from nemo_bluelm.runtime.environment import prepare
from nemo_bluelm.runtime.run_dir import read_metrics
from nemo_bluelm.train.packs import open_packs
from tests.runtime.processes import TRAIN, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def gpu_corpus(request):
    """NEMO_BLUELM_CORPUS, where the packages that the corpus is made from are missing; else the usual one."""
    return os.environ.get("NEMO_BLUELM_CORPUS") or request.getfixturevalue("corpus")


def loss_and_gradients(recipe, pack, dtype, implementation):
    """Mean loss, every gradient by global name, and the kinds of modules, on one pack."""
    from nemo_bluelm.model import bluelm, config, init

    shape = config.language_transformer_config(recipe.model.language, ParallelConfig(), PrecisionConfig(dtype))
    # Fused accumulation writes into the optimizer's buffers, which aren't there.
    shape = replace(shape, transformer_impl=implementation, gradient_accumulation_fusion=False)
    if implementation == "local":
        shape = replace(shape, apply_rope_fusion=False, cross_entropy_loss_fusion=False)
    model = bluelm.BlueLMModel(shape, recipe.model, 6, recipe.data.sequence_length)
    init.initialize(model, recipe.model.language, seed=1)
    pack = pack.to("cuda")
    loss = (model(pack, labels=pack.labels) * pack.loss_mask).sum() / pack.num_tokens
    loss.backward()
    kinds = {type(module).__name__ for module in model.modules()}
    return float(loss), {s.key: s.data.float() for s in init.local_shards(model, lambda w: w.grad)}, kinds


@pytest.mark.parametrize("qk_layernorm", ["false", "true"])
def test_te_spec_in_bf16_equals_local_spec_in_fp32(qk_layernorm, gpu_corpus):
    pytest.importorskip("transformer_engine")
    prepare()
    from nemo_bluelm.runtime.single import single_process_world

    recipe = load_recipe("tiny/sft", [f"data.root={gpu_corpus}", f"model.language.qk_layernorm={qk_layernorm}"])
    loader = open_packs(recipe)
    packs = (loader.load(pack).batch for pack in islice(loader.plan, 50))
    pack = next(pack for pack in packs if len(pack.tiles) > 8)
    with single_process_world():
        loss, grads, kinds = loss_and_gradients(recipe, pack, Dtype.bf16, "transformer_engine")
        reference, expected, local_kinds = loss_and_gradients(recipe, pack, Dtype.fp32, "local")
    assert {"TEPackedAttention", "FusedMLP"} <= kinds and "PackedAttention" not in kinds
    assert "PackedAttention" in local_kinds and not any(kind.startswith("TE") for kind in local_kinds)
    assert loss == pytest.approx(reference, rel=5e-3)
    assert grads.keys() == expected.keys()
    worst = max(float((grads[k] - g).norm() / g.norm().clamp(min=1e-6)) for k, g in expected.items())
    print(f"loss {loss:.5f} against {reference:.5f}; worst relative gradient error {worst:.4f}")
    assert worst < 0.08


def test_accumulated_gradients_are_the_usual_ones(gpu_corpus):
    """Products and the embedding that add to ``main_grad`` by themselves, over two micro-batches."""
    pytest.importorskip("transformer_engine")
    prepare()
    from nemo_bluelm.model import bluelm, config, init
    from nemo_bluelm.runtime.single import single_process_world

    recipe = load_recipe("tiny/sft", [f"data.root={gpu_corpus}"])
    loader = open_packs(recipe)
    packs = [loader.load(pack).batch for pack in islice(loader.plan, 2)]

    def gradients(accumulated: bool) -> dict[str, torch.Tensor]:
        shape = config.language_transformer_config(recipe.model.language, ParallelConfig(), PrecisionConfig(Dtype.bf16))
        shape = replace(shape, gradient_accumulation_fusion=accumulated)
        model = bluelm.BlueLMModel(shape, recipe.model, 6, recipe.data.sequence_length)
        init.initialize(model, recipe.model.language, seed=1)
        weights = dict(model.named_parameters())
        for weight in weights.values():
            weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight, dtype=torch.float32), False
        for pack in packs:
            pack = pack.to("cuda")
            (model(pack, labels=pack.labels) * pack.loss_mask).sum().backward()
            for weight in weights.values():  # as Megatron's hook
                if not weight.grad_added_to_main_grad or getattr(weight, "zero_out_wgrad", False):
                    weight.main_grad += weight.grad
                weight.grad, weight.grad_added_to_main_grad = None, False
        return {name: weight.main_grad for name, weight in weights.items()}

    with single_process_world():
        ours, usual = gradients(True), gradients(False)
    worst = max(float((ours[name] - grad).norm() / grad.norm().clamp(min=1e-6)) for name, grad in usual.items())
    print(f"worst relative difference {worst:.5f}")
    assert worst < 0.01


def test_parameters_are_counted_without_memory():
    script = (
        "import torch; from nemo_bluelm.config.schema import ModelConfig;"
        "from nemo_bluelm.runtime.params import count_parameters;"
        "print(count_parameters(ModelConfig())['total'], torch.cuda.max_memory_allocated())"
    )
    total, allocated = run("-c", script).split()[-2:]
    assert int(total) == 2_889_773_424
    assert int(allocated) < 100e6


@pytest.mark.parametrize("distributed_optimizer", ["false", "true"])
@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_a_recipe_trains_saves_and_resumes(backend, distributed_optimizer, gpu_corpus, tmp_path):
    folders = {"data.root": gpu_corpus, "data.index": tmp_path / "index", "run_dir": tmp_path / "run"}
    fixed = [*(f"{key}={folder}" for key, folder in folders.items()), "precision=bf16", "train.save_every=20"]
    fixed.append(f"parallel.distributed_optimizer={distributed_optimizer}")
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
        fixed += ["data.decode.backend=dali", "data.decode.device=gpu"]
    run(*TRAIN, "tiny/sft", *fixed, "train.steps=20", "optim.schedule=constant", timeout=200)
    run(*TRAIN, "tiny/sft", *fixed, "train.steps=40", "optim.schedule=constant", timeout=200)
    losses = [row["loss"] for row in read_metrics(tmp_path / "run")]
    assert len(losses) == 40
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
