"""The language model computes what transformers' Llama computes with the same weights, whatever the packing."""

import pytest
import torch
import torch.nn.functional as F
from hf_weights import grads, hf_language, language_tensors, load, state
from megatron_world import (
    assert_all_near,
    assert_near,
    document_rows,
    gradients,
    language_model,
    make_pack,
    random_tokens,
    run_language,
    small_config,
)

pytestmark = pytest.mark.usefixtures("world")

SHAPES = {
    "tied": dict(),
    "untied": dict(share_embeddings_and_output_weights=False, rotary_base=500_000),
    "heads wider than hidden": dict(kv_channels=24, num_attention_heads=6, num_query_groups=3),
    "one group": dict(num_query_groups=1),
    "no groups": dict(num_query_groups=4, num_layers=1),
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def pair(request):
    """Our model and Llama with the same weights, and documents of several lengths."""
    config = small_config(**request.param)
    oracle = hf_language(config, seed=1)
    model = language_model(config)
    load(model, language_tensors(state(oracle), config.language.num_query_groups))
    documents = [random_tokens(n, config.language.vocab_size, seed=n) for n in (13, 1, 40, 8, 27)]
    return model, oracle, documents, config


def test_logits(pair):
    model, oracle, documents, _ = pair
    pack = make_pack(documents, tail=12)
    with torch.no_grad():
        logits = run_language(model, pack)[0]
        for rows, document in zip(document_rows(pack), documents):
            assert_near(logits[rows], oracle(torch.tensor([document])).logits[0], 1e-5)


def test_losses_and_gradients(pair):
    model, oracle, documents, config = pair
    pack = make_pack(documents, tail=12)
    losses = run_language(model, pack, pack.labels)
    for rows, document in zip(document_rows(pack), documents):
        tokens = torch.tensor(document)
        expected = F.cross_entropy(oracle(tokens[None]).logits[0, :-1], tokens[1:], reduction="none")
        assert_near(losses[0, rows][:-1], expected, 1e-5)
        expected.sum().backward()
    assert pack.num_tokens == sum(len(document) - 1 for document in documents)
    (losses * pack.loss_mask).sum().backward()
    assert_all_near(gradients(model), language_tensors(grads(oracle), config.language.num_query_groups), 1e-4)


@pytest.mark.parametrize("alignment", [1, 4, 16])
def test_packed_equals_alone(pair, alignment):
    model, _, documents, _ = pair
    pack = make_pack(documents, alignment=alignment, tail=2 * alignment)
    with torch.no_grad():
        logits = run_language(model, pack)[0]
        for rows, document in zip(document_rows(pack), documents):
            assert_near(logits[rows], run_language(model, make_pack([document], alignment=1))[0], 1e-5)
