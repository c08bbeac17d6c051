"""The transformers peer: as many weights as ours, and one loss in every form that a pack can take."""

import pytest
import torch

from nemo_bluelm.bench.hf_batches import NO_TARGET, is_single, packed, padded, rows
from nemo_bluelm.bench.hf_model import HFModel
from nemo_bluelm.bench.hf_train import Case, cases
from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.config.schema import ModelConfig
from nemo_bluelm.data.chat import Encoded
from nemo_bluelm.data.packs import collate
from nemo_bluelm.runtime.params import count_parameters

IMAGE = 3


@pytest.fixture(scope="module")
def tiny() -> ModelConfig:
    """Two layers, 4 tokens a tile."""
    return load_recipe("tiny/sft", []).model


@pytest.fixture(scope="module")
def model(tiny):
    torch.manual_seed(0)
    return HFModel(tiny, IMAGE, images=True)


def document(length: int, tiles: int, seed: int) -> Encoded:
    """Random text, the placeholders of ``tiles`` tiles of 4 tokens first."""
    text = torch.randint(20, 2000, (length - 4 * tiles,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Encoded([IMAGE] * (4 * tiles) + text, [False] * (4 * tiles + 1) + [True] * (len(text) - 1), min(tiles, 1))


def pack(*documents: tuple[int, int], length: int = 64, alignment: int = 1):
    encoded = [document(size, tiles, seed) for seed, (size, tiles) in enumerate(documents)]
    shape, generator = (sum(n for _, n in documents), 3, 56, 56), torch.Generator().manual_seed(len(documents))
    tiles = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return collate(encoded, tiles, length, alignment, pad=0)


def loss(model, batch) -> float:
    with torch.no_grad():
        return float(model.loss(model(batch.tokens, batch.tiles, batch.positions, batch.mask()), batch.labels))


@pytest.mark.parametrize("shape", ["tiny", "full"])
def test_has_our_weights(shape, tiny):
    config = tiny if shape == "tiny" else ModelConfig()
    with torch.device("meta"):
        whole, text = HFModel(config, IMAGE, images=True), HFModel(config, IMAGE, images=False)
    ours = count_parameters(config)
    assert sum(weight.numel() for weight in whole.parameters()) == ours["total"]
    assert sum(weight.numel() for weight in text.parameters()) == ours["language"]


@pytest.mark.parametrize("alignment", [1, 8])
def test_padded_equals_packed(model, alignment):
    packs = [pack((20, 2), (9, 0), (24, 1), alignment=alignment), pack((50, 3), alignment=alignment)]
    assert loss(model, packed(packs)) == pytest.approx(loss(model, padded(packs)), rel=1e-5)
    alone = sum(loss(model, form([one])) for form in (packed, padded) for one in packs)
    assert loss(model, padded(packs)) == pytest.approx(alone / 2, rel=1e-5)


def test_rows_equal_packed(model):
    packs = [pack((64, 0)), pack((64, 4))]
    assert loss(model, rows(packs)) == pytest.approx(loss(model, packed(packs)), rel=1e-5)


def test_every_target_counts_once():
    packs = [pack((20, 2), (9, 0), alignment=8), pack((33, 1), alignment=8)]
    targets = sum(one.num_tokens for one in packs)
    for form in (packed, padded):
        batch = form(packs)
        assert int((batch.labels != NO_TARGET).sum()) == targets
        assert int((batch.tokens == IMAGE).sum()) == 12 and len(batch.tiles) == 3


def test_recompute_changes_nothing(tiny):
    torch.manual_seed(0)
    model = HFModel(tiny, IMAGE, images=True).train()
    batch, gradients = packed([pack((20, 2), (9, 0))]), []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        model.loss(model(batch.tokens, batch.tiles, batch.positions, batch.mask()), batch.labels).backward()
        gradients.append([weight.grad.clone() for weight in model.parameters() if weight.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for first, second in zip(*gradients):
        torch.testing.assert_close(first, second)


def tried(packs, fits) -> list[tuple]:
    recipe, found = load_recipe("tiny/sft", []), []
    for row, tell in cases(recipe, [packs], [1, 2, 4]):
        assert isinstance(row, Case)
        found.append((row["form"], row["micro_batch"], row["recompute"]))
        if fits(row):
            tell(True)
    return found


def test_micro_batches_grow_until_memory_runs_out():
    assert is_single(pack((64, 0)))
    assert tried([pack((64, 0))], lambda row: row["micro_batch"] < 2) == [("rows", 1, False), ("rows", 2, False)]


def test_layers_are_recomputed_where_the_smallest_does_not_fit():
    found = tried([pack((64, 0))], lambda row: row["recompute"] and row["micro_batch"] < 4)
    assert found == [("rows", 1, False), ("rows", 1, True), ("rows", 2, True), ("rows", 4, True)]


def test_packs_of_several_documents_are_tried_packed_and_padded():
    assert not is_single(pack((20, 0), (30, 0)))
    forms = [form for form, _, _ in tried([pack((20, 0), (30, 0)), pack((64, 0))], lambda row: True)]
    assert forms == ["packed"] * 3 + ["padded"] * 3
