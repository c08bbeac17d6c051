"""Run the stages of a curation recipe here or on Slurm, or show what would run."""

import contextlib
import dataclasses
import io
import json
import os
import sys
import tempfile
from typing import TextIO

from nemo_bluelm.data.curate.schema import CurationRecipe, Executor, to_dict
from nemo_bluelm.data.files import Files, expand, is_remote
from nemo_bluelm.errors import UserError

os.environ.setdefault("TQDM_DISABLE", "1")  # datatrove's bars, before it imports tqdm


def run(recipe: CurationRecipe, log: TextIO | None = None) -> str | None:
    """Run the recipe; tasks that an earlier run completed are not run again.

    Returns:
        The report as text, or None when Slurm's jobs are submitted and will write it to ``OUTPUT/report.txt``.

    Raises:
        UserError: datatrove or sbatch is missing, shards are missing or unreadable, the output can't be written
            or belongs to another recipe.
    """
    log = log or sys.stderr
    executors = _import()
    recipe, root, shards = _resolve(recipe)
    stages = executors.build_stages(recipe, shards, root)
    folder = executors.get_datafolder(recipe.output)
    try:
        _claim(folder, recipe, Files(root), shards)
        if recipe.executor.kind is Executor.slurm:
            _submit(executors, stages, recipe, log)
            return None
        for stage in stages:
            executors.run_here(stage, recipe.executor.workers)
            print(f"{stage.name}: {stage.tasks} {'task' if stage.tasks == 1 else 'tasks'} done", file=log, flush=True)
        return folder.cat_file("report.txt").decode()
    except OSError as error:  # the input's are ReadErrors
        why = error.strerror or error
        raise UserError(f"{recipe.output} can't be written: {why}; mend that and run it again to go on") from error


def _submit(executors, stages: list, recipe: CurationRecipe, log) -> None:
    job = executors.submit(stages, recipe)
    if job is None:
        print(f"every task is completed; see {recipe.output}/report.txt", file=log)
    else:
        print(f"{len(stages)} stages submitted, the last as job {job}; {recipe.output}/report.txt comes last", file=log)


def dry_run(recipe: CurationRecipe) -> str:
    """The stages and, for Slurm, each stage's sbatch script. Writes nothing.

    Raises:
        UserError: as :func:`run`.
    """
    executors = _import()
    recipe, root, shards = _resolve(recipe)
    lines = [f"{len(shards)} shards, {recipe.tasks} tasks -> {recipe.output}"]
    # datatrove makes the folder of Slurm's logs while it writes the script, so that it gets one to throw away.
    with tempfile.TemporaryDirectory() as scratch:
        stages = executors.build_stages(dataclasses.replace(recipe, output=scratch), shards, root)
        for stage in stages:
            names = " > ".join(step.name for step in stage.pipeline)
            lines.append(f"{stage.name}: {stage.tasks} x {names}")
            if recipe.executor.kind is Executor.slurm:
                lines.append(executors.script(stage, recipe).replace(scratch, recipe.output))
    return "\n".join(lines)


def _import():
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            from nemo_bluelm.data.curate import executors
    except ImportError as error:
        raise UserError(f"curation needs {error.name}; pip install 'nemo-bluelm[curate]'") from error
    return executors


def _resolve(recipe: CurationRecipe) -> tuple[CurationRecipe, str, list[str]]:
    """Absolute places, for tasks may run elsewhere, and the input's shards."""
    shards = expand(recipe.input.root, recipe.input.shards)
    output = recipe.output if is_remote(recipe.output) else os.path.abspath(recipe.output)
    root = recipe.input.root if is_remote(recipe.input.root) else os.path.abspath(recipe.input.root)
    return dataclasses.replace(recipe, output=output), root, shards


def _claim(folder, recipe: CurationRecipe, files: Files, shards: list[str]) -> None:
    """Refuses an output that another recipe, or other shards, have begun; completed tasks would be mixed up."""
    mine = _flat(to_dict(recipe) | {"shards": {shard: list(files.stat(shard)) for shard in shards}})
    if folder.exists("work/recipe.json"):
        theirs = json.loads(folder.cat_file("work/recipe.json"))
        differing = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
        if differing:
            raise UserError(f"{recipe.output} was begun with another {differing[0]}; name another output or remove it")
        return
    if folder.exists("") and folder.ls("", detail=False):
        raise UserError(f"{recipe.output} has files and is no output of curation; name another")
    with folder.open("work/recipe.json", "w") as file:
        json.dump(mine, file, indent=1)


def _flat(value, prefix: str = "") -> dict:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}" if prefix else key).items()}
