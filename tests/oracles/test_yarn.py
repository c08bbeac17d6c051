"""YaRN is transformers' YaRN: frequencies, attention scale, and logits beyond the original context."""

import pytest
import torch
from hf_weights import hf_language, language_tensors, load, state
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config as scale_in_rope,
)
from megatron_world import (
    assert_near,
    document_rows,
    language_model,
    make_pack,
    random_tokens,
    run_language,
    small_config,
)
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nemo_bluelm.config.schema import YarnConfig

pytestmark = pytest.mark.usefixtures("world")


@pytest.mark.parametrize("base", [10_000, 1_000_000])
@pytest.mark.parametrize("head", [16, 128])
@pytest.mark.parametrize(
    "yarn",
    [
        YarnConfig(factor=2.0),
        YarnConfig(factor=4.0),
        YarnConfig(factor=8.0),
        YarnConfig(factor=16.0),
        YarnConfig(factor=2.5, original_max_position_embeddings=64),
        YarnConfig(factor=8, beta_fast=16, beta_slow=2),
        YarnConfig(factor=16, mscale=0.7, mscale_all_dim=0.3),
    ],
    ids=["4K to 8K", "4K to 16K", "4K to 32K", "4K to 64K", "64 to 160", "other betas", "other scale"],
)
def test_frequencies_and_scale(yarn, head, base):
    model = language_model(small_config(yarn=yarn, kv_channels=head, rotary_base=base, num_layers=1))
    scaling = dict(rope_type="yarn", **vars(yarn))
    oracle = LlamaConfig(
        head_dim=head, rope_theta=base, rope_scaling=scaling, max_position_embeddings=int(4096 * yarn.factor)
    )
    frequencies, scale = ROPE_INIT_FUNCTIONS["yarn"](oracle, "cpu")
    angles, _ = model.rotary_pos_emb(2, packed_seq=True)
    ours = angles[1, 0, 0]  # the angles of position 1 are the frequencies, once for either half of the head
    torch.testing.assert_close(ours, torch.cat([frequencies, frequencies]), rtol=1e-6, atol=0)
    # Queries and keys are scaled in their product, not in RoPE.
    assert model.config.softmax_scale == pytest.approx(scale**2 / head**0.5, rel=1e-6)
    assert scale_in_rope(model.config) == 1.0
    assert not torch.allclose(frequencies, 1 / base ** (torch.arange(0, head, 2) / head))


@pytest.mark.parametrize(
    "original, head, lengths",
    [(32, 16, (5, 32, 33, 250)), (4096, 128, (7, 4300))],
    ids=["32 to 256", "4K to 32K"],
)
def test_logits(original, head, lengths):
    yarn = YarnConfig(factor=8, original_max_position_embeddings=original)
    config = small_config(yarn=yarn, kv_channels=head, num_attention_heads=2, num_query_groups=1, num_layers=1)
    oracle = hf_language(config, seed=1, longest=8 * original)
    model = language_model(config, longest=8 * original)
    load(model, language_tensors(state(oracle), config.language.num_query_groups))
    documents = [random_tokens(n, config.language.vocab_size, seed=n) for n in lengths]
    pack = make_pack(documents, tail=4)
    with torch.no_grad():
        logits = run_language(model, pack)[0]
        for rows, document in zip(document_rows(pack), documents):
            assert_near(logits[rows], oracle(torch.tensor([document])).logits[0], 1e-5)
        for layer in model.decoder.layers:  # were the attention scale lost in packs, it would show
            layer.self_attention.core_attention.softmax_scale = head**-0.5
        without = run_language(model, pack)[0]
    assert (without - logits).abs().max() > 0.1 * logits.abs().max()


def test_factor_one_is_plain_rope():
    config = small_config()
    oracle = hf_language(config, seed=1)
    model = language_model(config)
    load(model, language_tensors(state(oracle), config.language.num_query_groups))
    assert model.config.softmax_scale == pytest.approx(config.language.kv_channels**-0.5)
    assert type(model.rotary_pos_emb).__name__ == "RotaryEmbedding"
