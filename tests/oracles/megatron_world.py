"""Megatron's world of one process, and small models in it, for the tests that compute with the model."""

import pytest

from nemo_bluelm.runtime.environment import prepare

prepare()  # before anything imports Megatron-Core

import torch  # noqa: E402

from nemo_bluelm.config.schema import (  # noqa: E402
    Dtype,
    GeometryConfig,
    LanguageConfig,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    ProjectorConfig,
    VisionConfig,
    YarnConfig,
)
from nemo_bluelm.data.chat import Encoded  # noqa: E402
from nemo_bluelm.data.packs import PackedBatch, collate  # noqa: E402
from nemo_bluelm.model.bluelm import BlueLMModel, packed_seq_params  # noqa: E402
from nemo_bluelm.model.config import language_transformer_config  # noqa: E402
from nemo_bluelm.model.language import LanguageModel  # noqa: E402
from nemo_bluelm.runtime.single import single_process_world  # noqa: E402

IMAGE, PAD = 6, 0  # ids of the placeholder and of the pad token in small packs


@pytest.fixture(scope="module")
def world():
    """Megatron's process groups; of a module, because code under test may open a world of its own."""
    if torch.cuda.is_available():
        pytest.skip("the tolerances are those of fp32 arithmetic on a CPU")
    with single_process_world():
        yield


def small_config(
    tile: int = 56, yarn: YarnConfig | None = None, projector: ProjectorConfig | None = None, **language
) -> ModelConfig:
    """A model of two layers a part; ``language`` replaces fields of its LanguageConfig."""
    shape = dict(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        vocab_size=96,
        init_method_std=0.05,
        yarn=yarn or YarnConfig(),
    )
    return ModelConfig(
        vision=VisionConfig(num_layers=2, hidden_size=48, ffn_hidden_size=80, num_attention_heads=4),
        language=LanguageConfig(**{**shape, **language}),
        projector=projector or ProjectorConfig(),
        geometry=GeometryConfig(tile=tile, patch=14, merge=2),
    )


def language_model(config: ModelConfig, longest: int = 512) -> LanguageModel:
    """The language model alone, fp32; its weights are not set."""
    transformer = language_transformer_config(config.language, ParallelConfig(), PrecisionConfig(Dtype.fp32))
    return LanguageModel(transformer, config.language, longest)


def whole_model(config: ModelConfig, longest: int = 512, image_token_id: int = IMAGE) -> BlueLMModel:
    """The whole model, fp32; its weights are not set."""
    transformer = language_transformer_config(config.language, ParallelConfig(), PrecisionConfig(Dtype.fp32))
    return BlueLMModel(transformer, config, image_token_id, longest)


def random_tokens(length: int, vocab: int, seed: int) -> list[int]:
    """Ids above those of the placeholder and the pad token."""
    return torch.randint(IMAGE + 1, vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def random_tiles(count: int, tile: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, tile, tile), dtype=torch.uint8, generator=generator)


def make_pack(
    documents: list[list[int]], tiles: torch.Tensor | None = None, alignment: int = 4, tail: int = 0
) -> PackedBatch:
    """Documents whose every token but the first is a target, then ``tail`` unused tokens."""
    if tiles is None:
        tiles = torch.empty(0, 3, 14, 14, dtype=torch.uint8)
    encoded = [Encoded(tokens, [False] + [True] * (len(tokens) - 1)) for tokens in documents]
    length = sum(-(-len(tokens) // alignment) * alignment for tokens in documents) + tail
    return collate(encoded, tiles, length, alignment, PAD)


def document_rows(pack: PackedBatch) -> list[slice]:
    """Where each segment's real tokens lie in the row; an unused tail is an empty slice."""
    starts, real = pack.cu_seqlens_padded.tolist(), pack.cu_seqlens.diff().tolist()
    return [slice(start, start + length) for start, length in zip(starts, real)]


def run_language(model: LanguageModel, pack: PackedBatch, labels: torch.Tensor | None = None) -> torch.Tensor:
    """A pack through the language model alone: logits, or with labels the loss of every row."""
    return model(pack.tokens, pack.position_ids, None, labels=labels, packed_seq_params=packed_seq_params(pack))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter's gradient; a KeyError waits for whoever looks for one that is None."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = "") -> None:
    """The largest difference is at most ``tolerance`` times the largest magnitude expected, but no less than 1."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} != {tuple(expected.shape)}"
    error = (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0.0
    limit = tolerance * max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
    assert error <= limit, f"{what}: differs by {error:.3e}, allowed {limit:.3e}"


def assert_all_near(actual: dict, expected: dict, tolerance: float) -> None:
    """The same names, and every tensor near in relation to its own largest value."""
    assert actual.keys() == expected.keys(), sorted(actual.keys() ^ expected.keys())
    for name, value in expected.items():
        scale = value.abs().max().item()
        assert scale > 0, f"{name} is all zero, so it compares nothing"
        error = (actual[name].double() - value.double()).abs().max().item()
        assert error <= tolerance * scale, f"{name}: differs by {error:.3e} at a scale of {scale:.3e}"
