"""Every parallel layout against one process on the same packs: weights, first loss, every gradient, the loss curve."""

from pathlib import Path

import pytest
import torch

from tests.runtime.processes import torchrun

WORKER = Path(__file__).with_name("layout_worker.py")
STEPS = 20
SETTINGS = [f"train.steps={STEPS}", "data.sequence_length=256", "model.language.num_layers=4"]

LAYOUTS = {
    "tensor": (2, ["parallel.tensor=2"]),
    "sequence": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "pipeline": (2, ["parallel.pipeline=2"]),
    "uneven_pipeline": (2, ["parallel.pipeline=2", "parallel.first_stage_layers=1"]),
    "virtual_pipeline": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "data": (2, []),
    "context": (2, ["parallel.context=2"]),
}


class Run:
    """What all ranks of a run recorded, put together; pieces that several ranks hold must agree."""

    def __init__(self, folder: Path):
        ranks = [torch.load(file, weights_only=False) for file in sorted(folder.glob("rank*.pt"))]
        self.losses = next(rank["losses"] for rank in ranks if rank["losses"])
        self.weights = self._assemble(ranks, "weights")
        self.grads = self._assemble(ranks, "grads")

    @staticmethod
    def _assemble(ranks: list[dict], what: str) -> dict[str, torch.Tensor]:
        whole: dict[str, torch.Tensor] = {}
        for name, shape, place, piece in (entry for rank in ranks for entry in rank[what]):
            tensor = whole.setdefault(name, torch.full(shape, torch.nan))
            old = tensor[place]
            assert old.isnan().all() or relative(piece.view_as(old), old) < 1e-5, f"{what} of {name} differ by rank"
            tensor[place] = piece.view_as(old)
        missing = [name for name, tensor in whole.items() if tensor.isnan().any()]
        assert not missing, f"{what} that no rank holds: {missing}"
        return whole


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return float((value - reference).norm() / reference.norm().clamp(min=1e-12))


def train(corpus: Path, folder: Path, processes: int, overrides: list[str]) -> Run:
    folder.mkdir()
    torchrun(processes, WORKER, folder, "recipes/tiny/sft.yaml", f"data.root={corpus}", *SETTINGS, *overrides)
    return Run(folder)


@pytest.fixture(scope="module")
def one_process(corpus, tmp_path_factory) -> Run:
    return train(corpus, tmp_path_factory.mktemp("layouts") / "one", 1, [])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(layout, one_process, corpus, tmp_path):
    run = train(corpus, tmp_path / layout, *LAYOUTS[layout])

    assert run.weights.keys() == one_process.weights.keys()
    for name, weight in one_process.weights.items():
        assert torch.equal(run.weights[name], weight), f"{name} starts from other values"
    assert run.losses[0] == pytest.approx(one_process.losses[0], rel=1e-5)
    for name, grad in one_process.grads.items():
        assert relative(run.grads[name], grad) < 1e-4, name
    assert len(run.losses) == STEPS
    assert run.losses == pytest.approx(one_process.losses, rel=1e-3)
    assert one_process.losses[-1] < 0.8 * one_process.losses[0], "the reference itself must learn"
