"""Width pruning keeps what matters, computes the same where nothing is lost, and refuses what can't be cut."""

from dataclasses import replace

import pytest
import torch

from nemo_bluelm.config.schema import Activation, ProjectorConfig, VisionConfig
from nemo_bluelm.errors import UserError
from nemo_bluelm.model.init import initialize
from nemo_bluelm.model.prune import Importance, check_shapes, choose, cut, measure
from tests.oracles.megatron_world import assert_near, make_pack, random_tokens, small_config, whole_model

PREFIX = "language.decoder.layers.0."
HEAD = 16  # channels


def filled(config, seed: int = 0):
    model = whole_model(config).eval()
    initialize(model, config.language, seed)
    return model


def pack():
    return make_pack([random_tokens(length, 96, length) for length in (17, 30)], tail=8)


def pruned(wide, wide_config, config, importance=None):
    importance = importance or measure(wide, [pack()])
    kept = choose(importance, wide_config.language, config.language)
    model = whole_model(config).eval()
    model.load_state_dict(cut(wide, kept, config.language.share_embeddings_and_output_weights))
    return model, kept


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("qk_layernorm", [False, True])
def test_nothing_cut_nothing_changed(qk_layernorm):
    config = small_config(qk_layernorm=qk_layernorm)
    wide = filled(config)
    same, _ = pruned(wide, config, config)
    weights = dict(same.named_parameters())
    assert len(weights) > 30
    assert all(torch.equal(weight, weights[name]) for name, weight in wide.named_parameters())


@pytest.mark.usefixtures("world")
def test_dead_heads_and_neurons_go_without_a_trace():
    wide_config, config = small_config(), small_config(ffn_hidden_size=60, num_attention_heads=2)
    wide = filled(wide_config)
    state = wide.state_dict()
    dead_neurons, dead_heads = torch.randperm(96, generator=torch.Generator().manual_seed(1))[:36], (0, 3)
    with torch.no_grad():
        for layer in range(2):
            prefix = f"language.decoder.layers.{layer}."
            state[f"{prefix}mlp.linear_fc1.weight"].view(2, 96, -1)[:, dead_neurons] = 0
            state[f"{prefix}self_attention.linear_proj.weight"].view(64, 4, HEAD)[:, dead_heads] = 0
    # One of the two heads of either group; their outputs are told apart by what the layer makes of them.
    importance = measure(wide, [pack()])
    importance.heads[:, dead_heads] = 0
    narrow, kept = pruned(wide, wide_config, config, importance)
    assert kept.heads.tolist() == [[[1], [2]]] * 2
    assert not set(kept.ffn[0].tolist()) & set(dead_neurons.tolist())
    assert_near(narrow(pack()), wide(pack()), 1e-5)


@pytest.mark.usefixtures("world")
def test_importance_is_the_mean_over_real_tokens():
    config = small_config()
    wide, row = filled(config), pack()
    seen = {}
    layer = wide.language.decoder.layers[1]
    layer.mlp.linear_fc2.register_forward_pre_hook(lambda module, inputs: seen.update(ffn=inputs[0][:, 0]))
    layer.self_attention.linear_proj.register_forward_pre_hook(
        lambda module, inputs: seen.update(heads=inputs[0][:, 0])
    )
    found = measure(wide, [row, row])
    real = [*range(17), *range(20, 50)]  # documents are aligned to 4
    assert_near(found.ffn[1], seen["ffn"][real].abs().double().mean(0), 1e-6)
    heads = seen["heads"][real].view(47, 4, HEAD).double().square().sum(2).sqrt().mean(0)
    assert_near(found.heads[1], heads, 1e-6)
    assert found.hidden.shape == (64,) and (found.hidden > 0).all()


@pytest.mark.usefixtures("world")
def test_both_halves_of_a_gated_projector_are_cut():
    projector = ProjectorConfig(False, Activation.swiglu)
    wide_config, config = small_config(projector=projector), small_config(projector=projector, hidden_size=40)
    wide = filled(wide_config)
    narrow, kept = pruned(wide, wide_config, config)
    for name in ("projector.linear_fc1.weight", "projector.linear_fc1.bias"):
        old, new = wide.state_dict()[name], narrow.state_dict()[name]
        assert torch.equal(new, torch.cat([old[:64][kept.hidden], old[64:][kept.hidden]]))
    with pytest.raises(UserError, match="model.projector is .*the teacher has"):
        check_shapes(small_config(), config)


@pytest.mark.usefixtures("world")
def test_channels_are_those_of_every_matrix():
    wide_config, config = small_config(), small_config(hidden_size=40)
    wide = filled(wide_config)
    importance = measure(wide, [pack()])
    importance.hidden = torch.arange(64.0).flip(0)
    narrow, kept = pruned(wide, wide_config, config, importance)
    assert kept.hidden.tolist() == list(range(40))
    old, new = wide.state_dict(), narrow.state_dict()
    assert torch.equal(new[f"{PREFIX}mlp.linear_fc1.weight"], old[f"{PREFIX}mlp.linear_fc1.weight"][:, :40])
    assert torch.equal(new[f"{PREFIX}mlp.linear_fc2.weight"], old[f"{PREFIX}mlp.linear_fc2.weight"][:40])
    assert torch.equal(new["projector.linear_fc2.weight"], old["projector.linear_fc2.weight"][:40, :40])
    assert torch.equal(new["vision.position_embedding"], old["vision.position_embedding"])


def test_heads_of_many_small_groups_share_the_mean_of_their_keys():
    """As from BlueLM-7B, whose heads have keys of their own, to groups of several."""
    teacher = small_config(num_attention_heads=8, num_query_groups=8).language
    student = small_config(num_attention_heads=4, num_query_groups=2).language
    heads = torch.tensor([[5.0, 1, 7, 2, 8, 0, 3, 6]]).repeat(2, 1)
    kept = choose(Importance(torch.ones(64), heads, torch.ones(2, 96)), teacher, student)
    assert kept.heads[0].tolist() == [[0, 2], [4, 7]]


def test_groups_that_do_not_divide_are_made_of_neighbours():
    teacher = small_config(num_attention_heads=6, num_query_groups=2).language
    student = small_config(num_attention_heads=6, num_query_groups=3).language
    kept = choose(Importance(torch.ones(64), torch.ones(2, 6), torch.ones(2, 96)), teacher, student)
    assert kept.heads[0].tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.usefixtures("world")
def test_keys_of_merged_groups_are_their_mean():
    wide_config = small_config(num_attention_heads=4, num_query_groups=4)
    config = small_config(num_attention_heads=4, num_query_groups=2)
    wide = filled(wide_config)
    narrow, _ = pruned(wide, wide_config, config)
    old = wide.state_dict()[f"{PREFIX}self_attention.linear_qkv.weight"].view(4, 3, HEAD, 64)
    new = narrow.state_dict()[f"{PREFIX}self_attention.linear_qkv.weight"].view(2, 4, HEAD, 64)
    assert torch.equal(new[:, :2].flatten(0, 1), old[:, 0])
    assert_near(new[1, 2], (old[2, 1] + old[3, 1]) / 2, 1e-6)
    assert_near(new[0, 3], (old[0, 2] + old[1, 2]) / 2, 1e-6)


@pytest.mark.parametrize("tied_teacher, tied", [(True, False), (False, True), (False, False)])
@pytest.mark.usefixtures("world")
def test_tied_and_untied_embeddings(tied_teacher, tied):
    wide_config = small_config(share_embeddings_and_output_weights=tied_teacher)
    wide = filled(wide_config)
    narrow, kept = pruned(wide, wide_config, small_config(hidden_size=32, share_embeddings_and_output_weights=tied))
    assert ("language.output_layer.weight" in narrow.state_dict()) is not tied
    if not tied:
        source = "embedding.word_embeddings" if tied_teacher else "output_layer"
        expected = wide.state_dict()[f"language.{source}.weight"][:, kept.hidden]
        assert torch.equal(narrow.state_dict()["language.output_layer.weight"], expected)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_layers=3), "model.language.num_layers is 3, but the teacher has 2"),
        (dict(kv_channels=32), "model.language.kv_channels is 32, but the teacher has 16"),
        (dict(hidden_size=65), "model.language.hidden_size is 65, more than the teacher's 64"),
        (dict(num_attention_heads=8), "model.language.num_attention_heads is 8, more than the teacher's 4"),
    ],
)
def test_what_cannot_be_cut_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        check_shapes(small_config(), small_config(**changes))


def test_another_vit_is_refused():
    other = replace(small_config(), vision=VisionConfig(num_layers=1))
    with pytest.raises(UserError, match="model.vision is .*the teacher has"):
        check_shapes(small_config(), other)
