"""The parameter counts of the full model, printed and by arithmetic."""

import pytest

from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.config.schema import (
    Activation,
    GeometryConfig,
    LanguageConfig,
    ModelConfig,
    ProjectorConfig,
    VisionConfig,
)
from nemo_bluelm.runtime.params import count_parameters


def by_arithmetic(config):
    v, t, patches = config.vision, config.language, config.geometry.tile // config.geometry.patch
    h, f = v.hidden_size, v.ffn_hidden_size
    vision_layer = 4 * (h * h + h) + (h * f + f) + (f * h + h) + 2 * 2 * h
    vision = (3 * config.geometry.patch**2 * h + h) + patches**2 * h + v.num_layers * vision_layer + 2 * h

    d, queries, keys = t.hidden_size, t.num_attention_heads * t.kv_channels, t.num_query_groups * t.kv_channels
    language_layer = 2 * d * queries + 2 * d * keys + 3 * d * t.ffn_hidden_size + 2 * d
    language_layer += 2 * t.kv_channels if t.qk_layernorm else 0
    tables = 1 if t.share_embeddings_and_output_weights else 2
    language = tables * t.vocab_size * d + t.num_layers * language_layer + d

    folded = config.geometry.merge**2 * h
    norm, wide = 2 * folded * config.projector.layer_norm, d * (1 + (config.projector.activation == "swiglu"))
    projector = norm + (folded * wide + wide) + (d * d + d)
    return {
        "vision": vision,
        "projector": projector,
        "language": language,
        "total": vision + projector + language,
    }


def test_bluelm_2_5_3b():
    expected = {"vision": 412_987_248, "projector": 18_364_416, "language": 2_458_421_760, "total": 2_889_773_424}
    assert count_parameters(ModelConfig()) == expected == by_arithmetic(ModelConfig())


def test_the_preset_is_the_default_model(recipe_file):
    recipe = load_recipe(recipe_file(("- model: tiny", "- model: bluelm_2_5_3b")), [])
    assert by_arithmetic(recipe.model)["total"] == 2_889_773_424
    assert vars(recipe.model.language) == vars(LanguageConfig())


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(language=LanguageConfig(share_embeddings_and_output_weights=False)),
        ModelConfig(projector=ProjectorConfig(False, Activation.swiglu)),
        ModelConfig(language=LanguageConfig(qk_layernorm=True)),
        ModelConfig(
            vision=VisionConfig(num_layers=3, hidden_size=96, ffn_hidden_size=100, num_attention_heads=6),
            language=LanguageConfig(
                num_layers=5,
                hidden_size=80,
                ffn_hidden_size=72,
                num_attention_heads=6,
                num_query_groups=3,
                kv_channels=10,
                vocab_size=77,
            ),
            geometry=GeometryConfig(tile=90, patch=10, merge=3),
        ),
    ],
    ids=["untied", "gated", "normed heads", "odd sizes"],
)
def test_other_shapes(config):
    assert count_parameters(config) == by_arithmetic(config)
