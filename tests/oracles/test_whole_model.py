"""ViT, projector and language model together compute what their oracles compute when joined by hand."""

import pytest
import torch
import torch.nn.functional as F
from hf_weights import (
    grads,
    hf_language,
    hf_vision,
    language_tensors,
    load,
    normalized,
    randomize,
    state,
    vision_tensors,
)
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


class Joined(torch.nn.Module):
    """Transformers' SigLIP, an unfold-based projector and transformers' Llama on one document."""

    def __init__(self, config, seed: int):
        super().__init__()
        vision, language = config.vision.hidden_size, config.language.hidden_size
        self.side = config.geometry.tile // config.geometry.patch
        self.vision, self.language = hf_vision(config, seed), hf_language(config, seed + 1)
        layers = torch.nn.LayerNorm(4 * vision), torch.nn.Linear(4 * vision, language)
        self.projector = torch.nn.Sequential(*layers, torch.nn.GELU(), torch.nn.Linear(language, language))
        randomize(self.projector, seed + 2)

    def visual(self, tiles):
        features = self.vision(normalized(tiles)).last_hidden_state
        image = features.transpose(1, 2).unflatten(2, (self.side, self.side))
        image = F.pad(image, (0, self.side % 2, 0, self.side % 2))
        # unfold orders channels (channel, row, column); ours are (row, column, channel).
        blocks = F.unfold(image, 2, stride=2).unflatten(1, (-1, 4)).transpose(1, 2).flatten(1, 2)
        return self.projector(blocks.transpose(1, 2))

    def forward(self, tokens, tiles):
        embeds = self.language.get_input_embeddings()(tokens)
        if len(tiles):
            embeds = embeds.masked_scatter((tokens == IMAGE)[..., None], self.visual(tiles))
        return self.language(inputs_embeds=embeds).logits[0]


def joined_tensors(named, config):
    """Tensors of a Joined under the names of our model."""
    parts = {part: {} for part in ("vision", "projector", "language")}
    for name, tensor in named.items():
        part, rest = name.split(".", 1)
        parts[part][rest] = tensor
    places = {"0": "norm", "1": "linear_fc1", "3": "linear_fc2"}
    ours = {
        "vision": vision_tensors(parts["vision"], config.vision.num_attention_heads),
        "projector": {f"{places[n[0]]}{n[1:]}": t for n, t in parts["projector"].items()},
        "language": language_tensors(parts["language"], config.language.num_query_groups),
    }
    return {f"{part}.{name}": tensor for part, tensors in ours.items() for name, tensor in tensors.items()}


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
