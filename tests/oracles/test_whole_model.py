"""ViT, projector and language model together compute what their oracles compute when joined by hand."""

import pytest
import torch
import torch.nn.functional as F
from hf_weights import grads, load, state
from joined import Joined, joined_tensors
from megatron_world import (
    IMAGE,
    assert_all_near,
    assert_near,
    document_rows,
    gradients,
    make_pack,
    random_tiles,
    random_tokens,
    small_config,
    whole_model,
)

pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture(params=[(56, True), (70, False)], ids=["even grid, tied", "odd grid, untied"])
def case(request):
    """Our model and the joined one; a pack of two images, no image, one image of three tiles."""
    tile, tied = request.param
    config = small_config(tile=tile, share_embeddings_and_output_weights=tied)
    oracle = Joined(config, seed=1)
    model = whole_model(config)
    load(model, joined_tensors(state(oracle), config))
    image = [IMAGE] * (-(-(tile // 14) // 2)) ** 2
    text = iter(random_tokens(n, config.language.vocab_size, seed=n) for n in (5, 3, 9, 21, 2, 6))
    documents = [
        [*next(text), *image, *next(text), *image, *next(text)],
        next(text),
        [*next(text), *image, *image, *image, *next(text)],
    ]
    tiles = random_tiles(5, tile, seed=3)
    return model, oracle, documents, [tiles[:2], tiles[:0], tiles[2:]], config


def test_logits(case):
    model, oracle, documents, tiles, _ = case
    pack = make_pack(documents, torch.cat(tiles), tail=8)
    with torch.no_grad():
        logits = model(pack)[0]
        for rows, document, own in zip(document_rows(pack), documents, tiles):
            assert_near(logits[rows], oracle(torch.tensor([document]), own), 1e-5)


def test_losses_and_gradients(case):
    model, oracle, documents, tiles, config = case
    pack = make_pack(documents, torch.cat(tiles), tail=8)
    losses = model(pack, pack.labels)
    for rows, document, own in zip(document_rows(pack), documents, tiles):
        tokens = torch.tensor(document)
        expected = F.cross_entropy(oracle(tokens[None], own)[:-1], tokens[1:], reduction="none")
        assert_near(losses[0, rows][:-1], expected, 1e-5)
        expected.sum().backward()
    (losses * pack.loss_mask).sum().backward()
    assert_all_near(gradients(model), joined_tensors(grads(oracle), config), 1e-4)


def test_packed_equals_alone(case):
    model, _, documents, tiles, _ = case
    pack = make_pack(documents, torch.cat(tiles), tail=8)
    with torch.no_grad():
        logits = model(pack)[0]
        for rows, document, own in zip(document_rows(pack), documents, tiles):
            assert_near(logits[rows], model(make_pack([document], own, alignment=1))[0], 1e-5)


def test_images_matter_and_stay_in_order(case):
    model, _, documents, tiles, _ = case
    with torch.no_grad():
        pack = make_pack(documents, torch.cat(tiles), tail=8)
        swapped = make_pack(documents, torch.cat([tiles[0].flip(0), tiles[2]]), tail=8)
        before, after = model(pack)[0], model(swapped)[0]
        first, *others = document_rows(pack)
        assert (before[first] - after[first]).abs().max() > 0.1
        for rows in others:
            assert_near(after[rows], before[rows], 1e-5)
