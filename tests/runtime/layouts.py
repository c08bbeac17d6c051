"""Many layouts in one torchrun of two or four processes, and what their ranks recorded, put together."""

import json
from pathlib import Path

import pytest
import torch

from tests.runtime.layout_worker import STEPS
from tests.runtime.processes import torchrun

WORKER = Path(__file__).with_name("layout_worker.py")
# The large eps makes an update proportional to the gradient, as with momentum alone: Adam's division would blow up the
# last bits of the smallest gradients, and the next step's could not be compared.
SETTINGS = [
    "data.sequence_length=128",
    *("model.language.num_layers=4", "model.language.num_attention_heads=8", "model.language.num_query_groups=4"),
    "model.language.kv_channels=16",
    "train.global_batch_size=4",
    *("optim.eps=1", "optim.lr=0.3", "optim.warmup_steps=0", "optim.schedule=constant", "optim.weight_decay=0"),
]


class Run:
    """Losses, gradient norms, gradients of every step and the last weights; stacked layers each on its own."""

    def __init__(self, folder: Path):
        ranks = [torch.load(file, "cpu", weights_only=False) for file in sorted(folder.glob("rank*.pt"))]
        self.losses = next(rank["losses"] for rank in ranks if rank["losses"])
        self.norms = [rank["norms"] for rank in ranks]
        self.grads = [self._assemble(pieces) for pieces in zip(*(rank["grads"] for rank in ranks))]
        self.weights = self._assemble([rank["weights"] for rank in ranks])

    @staticmethod
    def _assemble(ranks) -> dict[str, torch.Tensor]:
        """Tensors from all ranks' pieces; those that several ranks hold must agree."""
        whole: dict[str, tuple[int, torch.Tensor]] = {}
        for name, stacked, shape, place, piece in (entry for rank in ranks for entry in rank):
            _, tensor = whole.setdefault(name, (stacked, torch.full(shape, torch.nan)))
            old = tensor[place]
            assert old.isnan().all() or relative(piece.view_as(old), old) < 1e-5, f"{name} differs by rank"
            tensor[place] = piece.view_as(old)
        layers = {}
        for name, (stacked, tensor) in whole.items():
            assert not tensor.isnan().any(), f"no rank holds all of {name}"
            layers |= {f"{name}[{i}]": layer for i, layer in enumerate(tensor)} if stacked else {name: tensor}
        return layers


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return float((value - reference).norm() / reference.norm().clamp(min=1e-12))


def train_all(corpus: Path, folder: Path, processes: int, layouts: dict[str, list[str]], timeout: float) -> Path:
    """Run all layouts in a single torchrun; returns the folder, in which each has one."""
    data = [f"data.root={corpus}", f"data.index={folder / 'index'}"]
    runs = {name: [*data, *SETTINGS, *overrides] for name, overrides in layouts.items()}
    (folder / "runs.json").write_text(json.dumps(runs))
    torchrun(processes, WORKER, folder, folder / "runs.json", timeout=timeout)
    return folder


def compare(run: Run, one: Run) -> None:
    """Loss 1e-5, every gradient at every step 1e-4, relative to one process; then the weights must agree too."""
    assert len(run.losses) == len(one.losses) == len(STEPS)
    assert run.losses == pytest.approx(one.losses, rel=1e-5)
    for norms in run.norms:
        assert norms == pytest.approx(one.norms[0], rel=1e-4)
    for step, (found, expected) in enumerate(zip(run.grads, one.grads)):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            error = relative(found[name], gradient)
            assert error < 1e-4, f"step {step} ({STEPS[step]} packs): gradient of {name} is off by {error:.1e}"
    for name, weight in one.weights.items():
        assert relative(run.weights[name], weight) < 1e-4, name
