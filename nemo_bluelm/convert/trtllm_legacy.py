"""The language model as a TensorRT-LLM checkpoint, which releases up to 1.2 build engines of; later ones don't."""

from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import torch
from safetensors.torch import save_file
from torch import Tensor

from nemo_bluelm.atomic import new_folder
from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.config.schema import Dtype, LanguageConfig
from nemo_bluelm.convert.exporting import export_state
from nemo_bluelm.convert.hf_files import rows_of, write_json
from nemo_bluelm.convert.table import LLAMA
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.run_dir import RECIPE_FILE, TOKENIZER_FILE

# Of a Llama's layer, but for queries, keys and values: the name there, and the axis that tensor parallelism splits.
_LAYER = {
    "input_layernorm": ("input_layernorm", None),
    "post_attention_layernorm": ("post_layernorm", None),
    "self_attn.o_proj": ("attention.dense", 1),
    "mlp.gate_proj": ("mlp.fc", 0),
    "mlp.up_proj": ("mlp.gate", 0),
    "mlp.down_proj": ("mlp.proj", 1),
}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_WHOLE = {_EMBEDDING: "transformer.vocab_embedding.weight", "model.norm.weight": "transformer.ln_f.weight"}
_QKV = ("q_proj", "k_proj", "v_proj")


def export_legacy(checkpoint: Path, out: Path, tensor: int = 1, dtype: Optional[torch.dtype] = None) -> None:
    """Write ``config.json`` and ``rank{i}.safetensors``; a rank's weights are in memory together.

    Args:
        tensor: ranks of tensor parallelism.
        dtype: None takes BF16 of a model that is trained so, else FP32.

    Raises:
        UserError: the weights can't be read; the model can't be split so, or has YaRN or norms of queries and keys,
            which those releases' Llama lacks; ``out`` exists or can't be written.
    """
    recipe = load_recipe(str(checkpoint / RECIPE_FILE), [])
    language = recipe.model.language
    _demand(language, tensor)
    if dtype is None:
        dtype = torch.bfloat16 if recipe.precision.dtype is Dtype.bf16 else torch.float32
    rows = rows_of(recipe, Tokenizer.load(checkpoint / TOKENIZER_FILE))
    with new_folder(out) as folder:
        write_json(folder / "config.json", _config(language, rows, tensor, str(dtype).removeprefix("torch.")))
        for rank in range(tensor):
            stream = export_state(checkpoint, LLAMA, rows)
            weights = {name: part.to(dtype) for name, part in _rank(stream, language, rank, tensor)}
            save_file(weights, folder / f"rank{rank}.safetensors")


def _demand(language: LanguageConfig, tensor: int) -> None:
    if language.yarn.factor > 1:
        raise UserError(
            "TensorRT-LLM's legacy Llama has no YaRN, and model.language.yarn.factor is "
            f"{language.yarn.factor}; export trtllm without --legacy"
        )
    if language.qk_layernorm:
        raise UserError(
            "TensorRT-LLM's legacy Llama doesn't norm queries and keys, and model.language.qk_layernorm is true; "
            "export trtllm without --legacy"
        )
    groups = language.num_query_groups
    splits = (language.num_attention_heads % tensor, language.ffn_hidden_size % tensor)
    if tensor < 1 or any(splits) or (groups % tensor and tensor % groups):
        raise UserError(f"{tensor} ranks don't divide the model's heads, groups and FFN; take another number")


def _config(language: LanguageConfig, rows: int, tensor: int, dtype: str) -> dict:
    return {
        "architecture": "LlamaForCausalLM",
        "dtype": dtype,
        "logits_dtype": "float32",
        "vocab_size": rows,
        "max_position_embeddings": language.yarn.original_max_position_embeddings,
        "hidden_size": language.hidden_size,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_attention_heads,
        "num_key_value_heads": language.num_query_groups,
        "head_size": language.kv_channels,
        "hidden_act": "silu",
        "intermediate_size": language.ffn_hidden_size,
        "norm_epsilon": language.layernorm_epsilon,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": float(language.rotary_base),
        "rotary_scaling": None,
        "mlp_bias": False,
        "attn_bias": False,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "share_embedding_table": False,  # a tied head is written out
        "mapping": {"world_size": tensor, "tp_size": tensor, "pp_size": 1},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
    }


def _rank(
    stream: Iterator[tuple[str, Tensor]], language: LanguageConfig, rank: int, tensor: int
) -> Iterator[tuple[str, Tensor]]:
    """One rank's names and tensors, of a Llama's."""
    qkv: list[Tensor] = []
    for name, weight in stream:
        if name in _WHOLE:
            yield _WHOLE[name], weight
        if name == _HEAD or (name == _EMBEDDING and language.share_embeddings_and_output_weights):
            rows = -(-len(weight) // tensor) * tensor
            yield _HEAD, torch.nn.functional.pad(weight, (0, 0, 0, rows - len(weight))).chunk(tensor)[rank].clone()
        if not name.startswith("model.layers."):
            continue
        number, kind = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
        if kind.removeprefix("self_attn.") in _QKV:
            # Where there are fewer groups than ranks, several ranks have the same one.
            heads = language.num_attention_heads if kind.endswith("q_proj") else language.num_query_groups
            parts = min(heads, tensor)
            qkv.append(weight.chunk(parts)[rank * parts // tensor])
            if len(qkv) == len(_QKV):
                yield f"transformer.layers.{number}.attention.qkv.weight", torch.cat(qkv)
                qkv.clear()
            continue
        theirs, axis = _LAYER[kind]
        part = weight if axis is None else weight.chunk(tensor, axis)[rank]
        yield f"transformer.layers.{number}.{theirs}.weight", part.contiguous()
