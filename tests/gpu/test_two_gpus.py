"""On two GPUs with NCCL and Transformer Engine: every layout follows one GPU, within BF16's rounding."""

import os

import pytest
import torch

from tests.runtime.layouts import Run, relative, train_all

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

BF16 = ["precision=bf16"]
LAYOUTS = {
    "tensor": "parallel.tensor=2",
    "sequence": "parallel.tensor=2 parallel.sequence=true",
    "pipeline": "parallel.pipeline=2",
    "virtual_pipeline": "parallel.pipeline=2 parallel.virtual_pipeline=2",
    "context_p2p": "parallel.context=2 parallel.context_comm=p2p",
    "context_all_gather": "parallel.context=2 parallel.context_comm=all_gather",
    "context_a2a": "parallel.context=2 parallel.context_comm=a2a",
    "data": "",
}
# A distributed optimizer's ranks keep shards of the gradients, and FP8's rounding hides what BF16's shows.
LOSSES_ONLY = {
    "distributed_optimizer": "parallel.distributed_optimizer=true",
    "sequence_fp8": "parallel.tensor=2 parallel.sequence=true precision=fp8_current",
    "data_fp8": "parallel.distributed_optimizer=true precision=fp8_current",
}


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory):
    pytest.importorskip("transformer_engine")
    corpus = os.environ.get("NEMO_BLUELM_CORPUS") or request.getfixturevalue("corpus")
    runs = {"one": [], **{name: overrides.split() for name, overrides in {**LAYOUTS, **LOSSES_ONLY}.items()}}
    folder = tmp_path_factory.mktemp("two_gpus")
    return train_all(corpus, folder, 2, {name: [*BF16, *overrides] for name, overrides in runs.items()}, timeout=300)


@pytest.fixture(scope="module")
def one(trained) -> Run:
    return Run(trained / "one")


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_and_gradients(name, trained, one):
    run = Run(trained / name)
    worst = max(relative(run.grads[0][key].float(), grad.float()) for key, grad in one.grads[0].items())
    print(f"{name}: losses {run.losses} against {one.losses}; worst gradient of the first step off by {worst:.4f}")
    assert run.losses == pytest.approx(one.losses, rel=5e-3)
    assert worst < 0.08


@pytest.mark.parametrize("name", LOSSES_ONLY)
def test_losses(name, trained, one):
    ranks = [torch.load(file, "cpu", weights_only=False) for file in (trained / name).glob("rank*.pt")]
    losses = next(rank["losses"] for rank in ranks if rank["losses"])
    print(f"{name}: losses {losses} against {one.losses}")
    assert losses == pytest.approx(one.losses, rel=2e-2)
