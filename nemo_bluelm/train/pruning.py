"""Prune a checkpoint's language model to a recipe's: calibrate, cut, write a checkpoint that ``init_from`` takes."""

import json
from itertools import islice
from pathlib import Path

from nemo_bluelm.atomic import new_folder
from nemo_bluelm.config.compose import to_yaml
from nemo_bluelm.config.schema import Recipe
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.run_dir import RECIPE_FILE, TOKENIZER_FILE, WEIGHTS_DIR, resolve_checkpoint
from nemo_bluelm.train.continuity import MAY_MOVE, first_difference

REPORT_FILE = "prune.json"


def prune(teacher: str, out: Path, recipe: Recipe, packs: int) -> bool:
    """Write the checkpoint folder ``out``; it is there whole or not at all, and what is there is kept.

    Args:
        teacher: run or checkpoint folder.
        recipe: the student's: its shape, and its data for calibration.
        packs: of calibration, the first of the recipe's plan.

    Returns:
        Whether it was written now.

    Raises:
        UserError: teacher, recipe, data or folder can't be used; ``out`` holds something else.
    """
    checkpoint = resolve_checkpoint(teacher, "TEACHER")
    made_of = {"teacher": str(checkpoint), "packs": packs, "seed": recipe.seed}
    if out.exists():
        _check_made(out, made_of, recipe)
        return False

    from nemo_bluelm.runtime.environment import prepare

    prepare()
    from nemo_bluelm.config.compose import load_recipe
    from nemo_bluelm.model.prune import check_shapes
    from nemo_bluelm.train.packs import open_packs

    wide = load_recipe(str(checkpoint / RECIPE_FILE), [])
    if wide.train.lora.rank:
        raise UserError(f"{checkpoint} has LoRA adapters; merge them with 'nemo-bluelm merge' and prune the result")
    check_shapes(wide.model, recipe.model)
    loader = open_packs(recipe)
    content = loader.tokenizer.content
    if content != (checkpoint / TOKENIZER_FILE).read_bytes():
        raise UserError(
            f"data.tokenizer {recipe.data.tokenizer} in data.root is not the teacher's; use "
            f"{checkpoint / TOKENIZER_FILE}"
        )
    batches = [loader.load(pack).batch for pack in islice(loader.plan, packs)]
    if not batches:
        raise UserError("data.sources give no pack to calibrate with; raise data.sources.NAME.max_epochs")
    with new_folder(out) as partial:
        report = _cut_into(partial / WEIGHTS_DIR, checkpoint, recipe, batches)
        (partial / RECIPE_FILE).write_text(to_yaml(recipe))
        (partial / TOKENIZER_FILE).write_bytes(content)
        (partial / REPORT_FILE).write_text(json.dumps({**made_of, **report}) + "\n")
    return True


def _cut_into(weights: Path, checkpoint: Path, recipe: Recipe, batches: list) -> dict:
    """Write the pruned weights; returns what was kept."""
    import torch

    from nemo_bluelm.model.prune import choose, cut, measure
    from nemo_bluelm.runtime.single import STATE_PREFIX, build_model, load_model, single_process_world
    from nemo_bluelm.runtime.storage import save_weights

    with single_process_world():
        model, wide, tokenizer = load_model(checkpoint, local=True)
        device = next(model.parameters()).device
        importance = measure(model, (batch.to(device) for batch in batches))
        kept = choose(importance, wide.model.language, recipe.model.language)
        state = cut(model, kept, recipe.model.language.share_embeddings_and_output_weights)
        del model
        student = build_model(recipe, tokenizer.image, local=True)
        missing = student.load_state_dict(state, strict=False).missing_keys
        assert not any(isinstance(student.state_dict()[name], torch.Tensor) for name in missing), missing
        weights.mkdir()
        save_weights(student.sharded_state_dict(prefix=STATE_PREFIX), weights)
    return {
        "tokens": sum(int(batch.cu_seqlens[-1]) for batch in batches),
        "hidden": kept.hidden.tolist(),
        "heads": kept.heads.tolist(),
        "ffn": kept.ffn.tolist(),
    }


def _check_made(out: Path, made_of: dict, recipe: Recipe) -> None:
    """
    Raises:
        UserError: ``out`` was not made of these.
    """
    from nemo_bluelm.config.compose import load_recipe

    if not (out / REPORT_FILE).exists():
        raise UserError(f"{out} exists and was not made by 'nemo-bluelm prune'; remove it or choose another folder")
    then = json.loads((out / REPORT_FILE).read_text())
    for name, value in made_of.items():
        if then.get(name) != value:
            raise UserError(
                f"{out} was pruned with {name} {then.get(name)}, and now it is {value}; remove it or choose another "
                "folder"
            )
    # The data calibrates: which channels are kept depends on it.
    key, now, then = first_difference(recipe, load_recipe(str(out / RECIPE_FILE), []), ("model.", "data."), MAY_MOVE)
    if key:
        raise UserError(f"{out} was pruned with {key} {then}, and now it is {now}; remove it or choose another folder")
