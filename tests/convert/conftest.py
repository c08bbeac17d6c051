"""Tiny models of transformers on disk, as a user downloads them."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from nemo_bluelm.data.tokenizer import train_tokenizer
from tests.oracles.hf_weights import randomize
from tests.tiny_checkpoint import TEXTS

VISION = dict(
    hidden_size=64,
    intermediate_size=144,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=60,  # 4 patches of 14 and 4 pixels left over, as 384 px are 27 patches and 6
    patch_size=14,
    attn_implementation="eager",
)
LANGUAGE = dict(
    vocab_size=300,  # smaller than the tokenizer with its special tokens: rows are added
    hidden_size=96,
    intermediate_size=224,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=20,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    max_position_embeddings=256,
    attn_implementation="eager",
)


def save(model: torch.nn.Module, folder: Path, seed: int = 0, **options) -> torch.nn.Module:
    randomize(model, seed)
    model.save_pretrained(folder, **options)
    return model


def save_language(
    folder: Path, shard: str = "5GB", dtype=torch.float32, kind: str = "llama", **changes
) -> PreTrainedModel:
    """A language model of three layers with its tokenizer, which lacks two of our special tokens."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**LANGUAGE, **changes})).to(dtype)
    save(model, folder, max_shard_size=shard)
    train_tokenizer(TEXTS, 320, folder / "tokenizer.json")
    content = json.loads((folder / "tokenizer.json").read_text())
    lacked = ("[|BlueThink|]", "<image>")
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in lacked]
    for token in lacked:
        del content["model"]["vocab"][token]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return model


def save_vision(folder: Path, both: bool) -> SiglipVisionModel:
    """A SigLIP with its text tower and pooling head, or its vision model alone."""
    if not both:
        return save(SiglipVisionModel(SiglipVisionConfig(**VISION, vision_use_head=False)), folder)
    text = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=50)
    model = save(SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)), folder)
    alone = SiglipVisionModel(SiglipVisionConfig(**VISION, vision_use_head=False))
    alone.load_state_dict(
        {name: value for name, value in model.state_dict().items() if name in alone.state_dict()}, strict=True
    )
    return alone.eval()


@pytest.fixture
def language_folder(tmp_path) -> Path:
    save_language(tmp_path / "llama", shard="400KB")
    return tmp_path / "llama"
