"""Write the checkpoint of a LoRA run as one without adapters, for a next stage's ``init_from``."""

import shutil
from dataclasses import replace
from pathlib import Path

from nemo_bluelm.atomic import new_folder
from nemo_bluelm.config.compose import load_recipe, to_yaml
from nemo_bluelm.config.schema import LoraConfig
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.run_dir import RECIPE_FILE, TOKENIZER_FILE, WEIGHTS_DIR, resolve_checkpoint


def merge(source: str, out: Path) -> Path:
    """Write the checkpoint folder ``out``; it is there whole or not at all.

    Args:
        source: run or checkpoint folder of a recipe with ``train.lora.rank``.

    Returns:
        The checkpoint that it was made of.

    Raises:
        UserError: no such checkpoint, or one without adapters; ``out`` exists or can't be written.
    """
    checkpoint = resolve_checkpoint(source, "CHECKPOINT")
    recipe = load_recipe(str(checkpoint / RECIPE_FILE), [])
    if not recipe.train.lora.rank:
        raise UserError(f"{checkpoint} has no LoRA adapters (its train.lora.rank is 0); use it as it is")
    with new_folder(out) as partial:
        from nemo_bluelm.runtime.environment import prepare

        prepare()
        (partial / WEIGHTS_DIR).mkdir()
        _merge_into(partial / WEIGHTS_DIR, checkpoint)
        merged = replace(recipe, train=replace(recipe.train, lora=LoraConfig()))
        (partial / RECIPE_FILE).write_text(to_yaml(merged))
        shutil.copyfile(checkpoint / TOKENIZER_FILE, partial / TOKENIZER_FILE)
    return checkpoint


def _merge_into(weights: Path, checkpoint: Path) -> None:
    from nemo_bluelm.runtime.single import STATE_PREFIX, load_model, single_process_world
    from nemo_bluelm.runtime.storage import save_weights

    with single_process_world():
        model, _, _ = load_model(checkpoint)
        save_weights(model.sharded_state_dict(prefix=STATE_PREFIX), weights)
