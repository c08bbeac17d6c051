"""NeMo's MegatronStrategy with a recipe's layout, and the trainer around it."""

import copy
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Optional

import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.distributed import DistributedDataParallelConfig
from nemo import lightning as nl
from torch import Tensor

from nemo_bluelm.config.schema import Dtype, Recipe
from nemo_bluelm.model.config import TORCH_DTYPE
from nemo_bluelm.runtime.environment import Launch
from nemo_bluelm.runtime.partial import joined, split
from nemo_bluelm.runtime.run_dir import Origin
from nemo_bluelm.runtime.storage import reading, without_manager


class Strategy(nl.MegatronStrategy):
    """MegatronStrategy whose checkpoints need no more than NeMo's Lightning part.

    NeMo's own ``save_checkpoint`` and ``load_checkpoint`` also carry ModelOpt state and import all of
    ``nemo.collections.llm`` for it, which takes seconds and a dozen more packages.

    Attributes:
        origins: where the weights of a fresh run come from; it may have more parts than they have.
    """

    origins: Sequence[Origin] = ()
    _plan: Optional[Callable[[], AsyncRequest]] = None

    @property
    def sharded_state_dict_metadata(self) -> dict[str, Any]:
        """Each rank writes its own shard of a distributed optimizer, as slices of the weights that any layout can read.

        NeMo's choices are to gather all of it on every rank first, which takes longer than a step and eight times the
        host's memory, or to write what no other tensor or pipeline parallelism can read.
        """
        metadata = super().sharded_state_dict_metadata
        if "distrib_optim_sharding_type" in metadata:
            metadata["distrib_optim_sharding_type"] = "fully_sharded_model_space"
        return metadata

    def optimizer_step(self, optimizer, closure, model=None, **kwargs) -> Any:
        """One optimizer step; ``grad_norm`` is its gradient norm before clipping, fp64 [], the same on all ranks."""

        def closure_with_loss() -> Tensor:
            optimizer.mcore_optimizer.loss = loss = closure()
            return loss

        loss, self.grad_norm, _ = super(nl.MegatronStrategy, self).optimizer_step(
            optimizer, closure_with_loss, model, **kwargs
        )
        return loss

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath, storage_options: Optional[Any] = None) -> None:
        """Gather what each rank writes; :meth:`take_plan` gives the rest of the work."""
        ddp = self.ddp_config
        if ddp.use_distributed_optimizer and ddp.overlap_param_gather:
            self.megatron_parallel.force_param_sync()  # the next step's forward pass would gather them
        checkpoint["state_dict"] = OrderedDict()
        checkpoint["sharded_state_dict"] = self.megatron_parallel.sharded_state_dict()
        if "optimizer_states" in checkpoint and self.trainer.state.fn == TrainerFn.FITTING:
            checkpoint["optimizer_states"] = {}
            checkpoint["optimizer"] = [self.optimizer_sharded_state_dict()]
        without_manager()
        tensors = {name: checkpoint.pop(name) for name in ("sharded_state_dict", "optimizer") if name in checkpoint}
        fixed = {**copy.deepcopy(checkpoint), **tensors}  # the loader's state and the like go on
        options = {"content_metadata": self.sharded_state_dict_metadata}
        self._plan = partial(self.checkpoint_io.save_checkpoint, fixed, filepath, storage_options=options)

    def barrier(self, name: Optional[str] = None) -> None:
        """Not after a checkpoint was planned: the ranks meet when it is published, and the host would wait here."""
        if name != "Trainer.save_checkpoint":
            super().barrier(name)

    def take_plan(self) -> tuple[Callable[[], AsyncRequest], bool]:
        """What is left to do for the checkpoint that was saved last, and whether ranks talk to each other in it.

        They do until a second plan was the same as the first.
        """
        plan, self._plan = self._plan, None
        writer = self.unwrapped_checkpoint_io.save_sharded_strategy
        return plan, not getattr(writer, "base_strategy", writer).validated_cache_reuse

    def load_checkpoint(self, checkpoint_path, selective_restore: bool = False) -> dict[str, Any]:
        with reading(checkpoint_path):
            return self._load(checkpoint_path, selective_restore)

    def _load(self, checkpoint_path, selective_restore: bool) -> dict[str, Any]:
        metadata = self.unwrapped_checkpoint_io.load_content_metadata(checkpoint_path)
        sharded = {"state_dict": self.megatron_parallel.sharded_state_dict(metadata=metadata)}
        if self.should_restore_optimizer_states(selective_restore) and self.trainer.state.fn == TrainerFn.FITTING:
            sharded["optimizer"] = [self.optimizer_sharded_state_dict(is_loading=True, metadata=metadata)]
        if not selective_restore:
            return self.checkpoint_io.load_checkpoint(checkpoint_path, sharded_state_dict=sharded, strict=True)
        loaded, rest = [], sharded["state_dict"]
        for origin in self.origins:
            found, rest = split(rest, origin)
            with reading(origin.checkpoint):
                state = {"state_dict": found}
                state = self.checkpoint_io.load_checkpoint(origin.checkpoint, sharded_state_dict=state, strict=True)
            loaded.append(state["state_dict"])
        return {"state_dict": joined(*loaded, rest)}


def build_strategy(recipe: Recipe, origins: Sequence[Origin] = ()) -> Strategy:
    """The strategy for a recipe's layout; a fresh run starts from the weights of ``origins``."""
    parallel, bf16 = recipe.parallel, recipe.precision.dtype == Dtype.bf16
    restore = None
    if origins:
        restore = nl.RestoreConfig(path=str(origins[0].checkpoint), load_model_state=True, load_optim_state=False)
    strategy = Strategy(
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        context_parallel_size=parallel.context,
        pipeline_dtype=TORCH_DTYPE[recipe.precision.dtype],
        ddp=DistributedDataParallelConfig(
            grad_reduce_in_fp32=bf16,
            use_distributed_optimizer=parallel.distributed_optimizer,
            overlap_grad_reduce=parallel.overlap,
            overlap_param_gather=parallel.overlap and parallel.distributed_optimizer,
            check_for_nan_in_grad=False,  # costs a pass and a wait on each bucket; train.metrics looks at the norm
        ),
        use_te_rng_tracker=recipe.train.cuda_graphs,  # its states can be captured
        process_group_backend="nccl" if torch.cuda.is_available() else "gloo",
        ckpt_async_save=False,
        ckpt_parallel_load=False,
        ckpt_assume_constant_structure=True,  # of the state from step to step: planned and checked once a run
        restore_config=restore,
    )
    strategy.origins = origins
    # nemo_bluelm.runtime.saving writes. NeMo's switch for it would add its own writer, a forked process.
    strategy.unwrapped_checkpoint_io.async_save = True
    return strategy


def build_trainer(recipe: Recipe, strategy: Strategy, callbacks: list[Callback]) -> nl.Trainer:
    """A NeMo trainer for ``recipe.train.steps`` steps; world size and ranks come from the launcher's environment."""
    launch = Launch.from_environment()
    # Named, because Lightning would take any job allocation of Slurm's for ranks that srun started.
    environment = TorchElasticEnvironment() if "RANK" in os.environ else LightningEnvironment()
    return nl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=launch.local_world_size,
        num_nodes=launch.world_size // launch.local_world_size,
        plugins=[environment],
        strategy=strategy,
        max_steps=recipe.train.steps,
        callbacks=callbacks,
        logger=False,
        log_every_n_steps=0,  # Lightning would read values to log, and wait for the GPU
        enable_checkpointing=False,  # nemo_bluelm.runtime.checkpoints publishes them atomically
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
