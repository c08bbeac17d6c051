"""Models outside a training job, in one process or split over few: counted, generated with, exported."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.config.schema import ParallelConfig, PrecisionConfig, Recipe
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.run_dir import RECIPE_FILE, TOKENIZER_FILE, WEIGHTS_DIR

STATE_PREFIX = "module."  # NeMo stores the state of the LightningModule, which holds the model as ``module``


@contextmanager
def single_process_world() -> Iterator[None]:
    """Megatron's process groups with one rank; no network, no environment variables. Call ``prepare`` before."""
    with _world(1, store=torch.distributed.HashStore(), rank=0, world_size=1):
        yield


@contextmanager
def tensor_parallel_world(ranks: int) -> Iterator[None]:
    """Megatron's process groups with a model split over the ``ranks`` processes that torchrun started.

    Raises:
        UserError: there are fewer GPUs than processes.
    """
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if ranks > gpus:
            raise UserError(
                f"the model is to be split over {ranks} GPUs, this machine has {gpus}; use no more than that"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with _world(ranks):
        yield


@contextmanager
def _world(tensor: int, **rendezvous) -> Iterator[None]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", **rendezvous)
    try:
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor)
        model_parallel_cuda_manual_seed(0)  # Transformer Engine's modules draw from Megatron's tracker when built
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def build_model(recipe: Recipe, image_token_id: int, local: bool = False) -> torch.nn.Module:
    """The model of a recipe, its weights not set; whole inside :func:`single_process_world`, else this rank's part.

    Args:
        local: of Megatron-Core's own layers, whose parts can be looked into, where Transformer Engine's are there too.
    """
    from megatron.core import parallel_state

    from nemo_bluelm.model.bluelm import BlueLMModel
    from nemo_bluelm.model.config import language_transformer_config
    from nemo_bluelm.model.lora import add_lora, leaves_mlp

    precision = PrecisionConfig(recipe.precision.dtype)  # prompts have lengths that FP8 products can't take
    layout = ParallelConfig(tensor=parallel_state.get_tensor_model_parallel_world_size())
    config = language_transformer_config(recipe.model.language, layout, precision)
    config = replace(config, gradient_accumulation_fusion=False)  # there is no optimizer's buffer to add to
    if local:
        config = replace(config, transformer_impl="local", apply_rope_fusion=False)
    lora = recipe.train.lora
    config.fused_mlp = leaves_mlp(lora)
    model = BlueLMModel(config, recipe.model, image_token_id, recipe.data.sequence_length)
    if lora.rank:
        add_lora(model.language, lora)
    return model


def load_model(checkpoint: Path, local: bool = False) -> tuple[torch.nn.Module, Recipe, Tokenizer]:
    """The model of a checkpoint of any layout in evaluation mode, inside a world as :func:`build_model`.

    LoRA's adapters are merged into the weights beside them.

    Args:
        checkpoint: as :func:`nemo_bluelm.runtime.run_dir.resolve_checkpoint` gives it.
        local: as :func:`build_model`.

    Raises:
        UserError: the weights can't be read.
    """
    from megatron.core import dist_checkpointing

    from nemo_bluelm.model.lora import merge_lora
    from nemo_bluelm.runtime.storage import reading

    recipe = load_recipe(str(checkpoint / RECIPE_FILE), [])
    tokenizer = Tokenizer.load(checkpoint / TOKENIZER_FILE)
    model = build_model(recipe, tokenizer.image, local)
    wanted = model.sharded_state_dict(prefix=STATE_PREFIX)
    with reading(checkpoint):
        state = dist_checkpointing.load(wanted, str(checkpoint / WEIGHTS_DIR))
    # Megatron adds the training state (step, optimizer settings) of the checkpoint to what was asked for.
    model.load_state_dict({name.removeprefix(STATE_PREFIX): state[name] for name in wanted})
    if recipe.train.lora.rank:
        merge_lora(model.language)
    return model.eval(), recipe, tokenizer
