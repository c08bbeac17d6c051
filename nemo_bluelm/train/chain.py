"""Runs a pipeline: each stage as a process of ``nemo-bluelm``, what is finished is left, what is cut off goes on."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from nemo_bluelm.children import python_environment
from nemo_bluelm.config.checks import check_machine, check_recipe
from nemo_bluelm.config.compose import NO_CHECKPOINTS, load_recipe
from nemo_bluelm.config.pipeline import Pipeline, Stage
from nemo_bluelm.config.schema import DistillConfig, Recipe
from nemo_bluelm.data.open import find
from nemo_bluelm.data.teacher_logits import read_meta
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.checksums import find_damage
from nemo_bluelm.runtime.parent import bound_to_this_process
from nemo_bluelm.runtime.run_dir import (
    COMPLETE_FILE,
    RECIPE_FILE,
    Origin,
    newest,
    published,
    resolve_checkpoint,
    step_of,
)
from nemo_bluelm.train.continuity import check_init, check_resume, check_shapes, origin_parts
from nemo_bluelm.train.pruning import prune
from nemo_bluelm.train.teachers import check_teacher

PRUNING_PACKS = 32  # of calibration


def run_pipeline(pipeline: Pipeline, nproc: int, max_restarts: int = 0) -> int:
    """Check every stage, then run those that aren't finished, one after the other.

    Ended at any moment and called again, it ends as if it had not been: a stage goes on from its newest checkpoint.

    Args:
        nproc: processes of each training stage.
        max_restarts: how often a training stage is started again where a process of it crashed or was killed.

    Returns:
        Exit code: that of the first stage that failed or was stopped (128 + n by signal n), else 0.

    Raises:
        UserError: a mistake in the recipe, the data or the run folder of any stage.
    """
    done = check_stages(pipeline, dict.fromkeys((stage.name for stage in pipeline.stages), nproc))
    for number, stage in enumerate(pipeline.stages, 1):
        place = f"{pipeline.name}  stage {number} of {len(pipeline.stages)}, {stage.name}"
        if done[stage.name]:
            print(f"{place}: complete in {stage.folder}", file=sys.stderr)
            continue
        print(f"{place}: {'pruning to the shape of ' if stage.teacher else ''}{stage.recipe}", file=sys.stderr)
        ranks = ["--nproc", str(nproc)] if nproc > 1 else []
        restarts = ["--max-restarts", str(max_restarts)] if max_restarts else []
        words = arguments(stage, pipeline) + ([] if stage.teacher else ranks + restarts)
        command = [sys.executable, "-m", "nemo_bluelm.cli.main", *words]
        environment = {**os.environ, **python_environment(), **bound_to_this_process()}
        code = _run(command, environment)
        if code < 0:
            name = signal.Signals(-code).name
            print(f"{place}: ended by {name}; the same command goes on from its newest checkpoint", file=sys.stderr)
            return 128 - code
        if code:
            return code
    return 0


def check_stages(pipeline: Pipeline, world_sizes: dict[str, int], here: bool = True) -> dict[str, bool]:
    """Check every stage before the first is run.

    Args:
        world_sizes: ranks of each stage, by its name.
        here: they run on this machine, which must have what they need.

    Returns:
        Whether each stage is finished, by its name.

    Raises:
        UserError: what is wrong with a stage, which is named.
    """
    recipes = {stage.name: load_stage(stage) for stage in pipeline.stages}
    done: dict[str, bool] = {}
    for stage in pipeline.stages:
        try:
            done[stage.name] = _check(stage, pipeline, recipes, done, world_sizes[stage.name], here)
        except UserError as error:
            raise UserError(f"stage {stage.name}: {error}") from error
    return done


def load_stage(stage: Stage) -> Recipe:
    """The complete recipe of a stage.

    Raises:
        UserError: as ``load_recipe``, the stage named.
    """
    # What a pruned student starts and learns from is not needed to prune.
    unneeded = NO_CHECKPOINTS if stage.teacher else ()
    try:
        recipe = load_recipe(stage.recipe, [*unneeded, *stage.overrides])
        return replace(recipe, distill=DistillConfig()) if stage.teacher else recipe
    except UserError as error:
        raise UserError(f"stage {stage.name}: {error}") from error


def _check(
    stage: Stage,
    pipeline: Pipeline,
    recipes: dict[str, Recipe],
    done: dict[str, bool],
    world_size: int,
    here: bool,
) -> bool:
    """Whether the stage is finished; ``done`` says it of the earlier ones.

    Raises:
        UserError: what is wrong with it.
    """
    recipe = recipes[stage.name]
    check_recipe(recipe, world_size=None if stage.teacher else world_size)
    if here and not stage.teacher:
        check_machine(recipe)
    begun = stage.folder.exists() if stage.teacher else newest(stage.folder) is not None
    if begun:
        for other in stage.after:
            if not done[other]:
                raise UserError(
                    f"{stage.folder} holds a checkpoint that was made from stage {other}, and that stage isn't "
                    f"finished: bring back {pipeline.stage(other).folder}, or remove {stage.folder} to make it again"
                )
    if stage.teacher:
        if begun:
            prune(str(pipeline.stage(stage.teacher).folder), stage.folder, recipe, PRUNING_PACKS)
            return True
    elif begun:
        for checkpoint in reversed(published(stage.folder)):
            if find_damage(checkpoint, names={RECIPE_FILE}) is None:  # else training takes the one before, too
                check_resume(recipe, checkpoint)
                break
        if (stage.folder / COMPLETE_FILE).exists() and step_of(newest(stage.folder)) >= recipe.train.steps:
            return True
    tokenizer, _ = find(recipe.data)
    for key, parts in ({} if begun else origin_parts(recipe)).items():
        folder = getattr(recipe, key)
        origin = next((s for s in pipeline.stages if Path(folder) == s.folder), None)
        if origin is None:
            check_init(recipe, Origin(key, resolve_checkpoint(folder, key), parts), tokenizer.content)
        else:
            check_shapes(recipe, recipes[origin.name], parts, key)
    distill = recipe.distill
    if distill.teacher is not None and not any(Path(distill.teacher) == other.folder for other in pipeline.stages):
        check_teacher(recipe, tokenizer.content)
    if distill.logits is not None:
        read_meta(Path(distill.logits))
    return False


def arguments(stage: Stage, pipeline: Pipeline) -> list[str]:
    """The command line of a stage, behind ``nemo-bluelm``."""
    if stage.teacher:
        teacher = str(pipeline.stage(stage.teacher).folder)
        packs = str(PRUNING_PACKS)
        return ["prune", teacher, str(stage.folder), "--recipe", stage.recipe, *stage.overrides, "--packs", packs]
    return ["train", stage.recipe, *stage.overrides]


def _run(command: list[str], environment: dict[str, str]) -> int:
    """The exit code of a stage. SIGINT and SIGTERM are passed on to it: it saves before it ends."""
    # In a session of its own: Ctrl-C in a terminal would reach it beside what is passed on, and a second one ends it.
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    passed_on = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, lambda got, frame: process.send_signal(got)) for number in passed_on}
    try:
        return process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
