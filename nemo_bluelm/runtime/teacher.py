"""A frozen model beside the one that is trained: no gradients, no optimizer states, in no checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_bluelm.config.schema import PrecisionConfig, Recipe
from nemo_bluelm.data.packs import PackedBatch
from nemo_bluelm.model.bluelm import BlueLMModel
from nemo_bluelm.model.config import language_transformer_config
from nemo_bluelm.runtime.run_dir import WEIGHTS_DIR
from nemo_bluelm.runtime.single import STATE_PREFIX
from nemo_bluelm.runtime.storage import reading


class Teacher:
    """A checkpoint's model in a running job, split over tensor-parallel ranks as the student is, or whole on each.

    It is no torch module, so that whatever holds it doesn't take its weights for its own.

    Args:
        checkpoint: of any layout; as :func:`nemo_bluelm.runtime.run_dir.resolve_checkpoint` gives it.
        recipe: its model, dtype and layout; ``parallel.tensor`` 1 in a job of more is whole on each rank.
        image_token_id: id of the tokenizer's image placeholder.

    Raises:
        UserError: the weights can't be read.
    """

    def __init__(self, checkpoint: Path, recipe: Recipe, image_token_id: int):
        self.model_config = recipe.model
        whole = recipe.parallel.tensor < parallel_state.get_tensor_model_parallel_world_size()
        groups = _whole_on_each() if whole else None
        config = language_transformer_config(
            recipe.model.language, recipe.parallel, PrecisionConfig(recipe.precision.dtype)
        )
        length = recipe.data.sequence_length
        with _as_if_alone(whole):
            self._model = BlueLMModel(config, recipe.model, image_token_id, length, pg_collection=groups)
            wanted = self._model.sharded_state_dict(prefix=STATE_PREFIX)
        with reading(checkpoint):
            # Ranks that hold the same piece would be taken for a mistake.
            state = dist_checkpointing.load(wanted, str(checkpoint / WEIGHTS_DIR), validate_access_integrity=False)
        self._model.load_state_dict({name.removeprefix(STATE_PREFIX): state[name] for name in wanted})
        self._model.requires_grad_(False).eval()
        self._piece = parallel_state.get_tensor_model_parallel_group() if whole else None

    @torch.no_grad()
    def logits(self, batch: PackedBatch) -> Tensor:
        """[S / context size, vocabulary / tensor size], this rank's rows and piece of the vocabulary."""
        logits = self._model(batch)[0]
        return logits if self._piece is None else logits.chunk(self._piece.size(), 1)[self._piece.rank()]


def _whole_on_each() -> ProcessGroupCollection:
    """Every tensor-parallel rank has the whole model; context-parallel ranks share a pack as the student's do."""
    rank = torch.distributed.get_rank()
    alone: ProcessGroup = torch.distributed.new_group([rank], use_local_synchronization=True)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.tp = alone
    return groups


@contextmanager
def _as_if_alone(whole: bool) -> Iterator[None]:
    """Megatron-Core 0.15 names a layer's place in checkpoints by the job's tensor-parallel rank, not by its group's."""
    if not whole:
        yield
        return
    parallel_state.set_tensor_model_parallel_world_size(1)
    parallel_state.set_tensor_model_parallel_rank(0)
    try:
        yield
    finally:
        parallel_state.set_tensor_model_parallel_world_size(None)
        parallel_state.set_tensor_model_parallel_rank(None)
