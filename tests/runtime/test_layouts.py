"""Every parallel layout against one process on the same packs: loss, every gradient and the weights of every step."""

import pytest

from tests.runtime.layout_worker import STEPS
from tests.runtime.layouts import Run, compare, train_all

pytestmark = pytest.mark.slow

TWO = {
    "tensor": "parallel.tensor=2",
    "every_rank_all_tiles": "parallel.tensor=2 parallel.share_tiles=false",
    "sequence": "parallel.tensor=2 parallel.sequence=true",
    "pipeline": "parallel.pipeline=2",
    "uneven_pipeline": "parallel.pipeline=2 parallel.first_stage_layers=1",
    "virtual_pipeline": "parallel.pipeline=2 parallel.virtual_pipeline=2",
    "context": "parallel.context=2",
    "context_a2a": "parallel.context=2 parallel.context_comm=a2a",
    "data": "",
}
FOUR = {
    "tensor_context": "parallel.tensor=2 parallel.context=2",
    "sequence_context_a2a": "parallel.tensor=2 parallel.sequence=true parallel.context=2 parallel.context_comm=a2a",
    "tensor_pipeline": "parallel.tensor=2 parallel.pipeline=2",
    "pipeline_context": "parallel.pipeline=2 parallel.context=2",
    "data_context": "parallel.context=2",
    "data_tensor": "parallel.tensor=2",
    "data": "",
}


def both_sizes(layouts: dict[str, str]) -> dict[str, list[str]]:
    """Each layout with one and with two packs in a micro-batch."""
    return {
        f"{name}-{packs}": [*overrides.split(), f"train.micro_batch_size={packs}"]
        for name, overrides in layouts.items()
        for packs in (1, 2)
    }


NORMED = ["model.language.qk_layernorm=true"]
EIGHT = ["train.global_batch_size=8"]  # for two packs in a micro-batch on each of four ranks
LAYOUTS = {
    2: {
        "one-2": ["train.micro_batch_size=2"],
        **both_sizes(TWO),
        **{f"normed_{name}": [*TWO[name].split(), *NORMED] for name in ("tensor", "sequence", "pipeline")},
    },
    4: both_sizes(FOUR) | {"data-2": ["train.micro_batch_size=2", *EIGHT]},
}
REFERENCES = {"one": [], "one-8": EIGHT, "one-normed": NORMED}


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """Folder with the runs of two or of four processes, made when the first of them is asked for."""
    folders = {}

    def of(processes):
        if processes not in folders:
            folder = tmp_path_factory.mktemp(f"{processes}_processes")
            alone = REFERENCES if processes == 2 else {}
            folders[processes] = train_all(corpus, folder, processes, {**alone, **LAYOUTS[processes]}, timeout=500)
        return folders[processes]

    return of


@pytest.fixture(scope="module")
def one_process(trained) -> dict[str, Run]:
    return {name: Run(trained(2) / name) for name in REFERENCES}


def test_the_reference_learns_from_every_kind_of_packs(one_process):
    one_process = one_process["one"]
    assert one_process.losses[-1] < 0.95 * one_process.losses[0]
    for kind, gradients in zip(STEPS, one_process.grads):
        silent = {name for name, gradient in gradients.items() if not gradient.any()}
        assert silent == {name for name in gradients if kind == "text" and not name.startswith("language.")}


@pytest.mark.parametrize("processes, name", [(n, name) for n, names in LAYOUTS.items() for name in names])
def test_layout_equals_one_process(processes, name, trained, one_process):
    last = LAYOUTS[processes][name][-1:]
    alone = "one-8" if last == EIGHT else "one-normed" if last == NORMED else "one"
    compare(Run(trained(processes) / name), one_process[alone])
