"""What a launch runs: each stage of a recipe or pipeline, or each run of a sweep, as a job with its command."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from nemo_bluelm import resources
from nemo_bluelm.config.ablation import load_ablation
from nemo_bluelm.config.checks import check_recipe
from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.config.pipeline import Pipeline, Stage, is_pipeline, load_pipeline, quoted, read_mapping
from nemo_bluelm.config.translate import override_key
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.run_dir import COMPLETE_FILE, WEIGHTS_DIR
from nemo_bluelm.train.chain import arguments, check_stages

LAUNCH_DIR = "launch"  # in the folder of a launch: scripts, control files and logs of its jobs
MEASURES = "measures"  # the last job of an ablation


@dataclass(frozen=True)
class Unit:
    """One run of a job.

    Attributes:
        command: words behind ``nemo-bluelm``.
        folder: the run's, absolute.
        marker: a file or folder that is there once the run is complete, and only then.
        done: whether it is, of all steps that are wanted now.
    """

    command: tuple[str, ...]
    folder: Path
    marker: Path
    done: bool = False


@dataclass(frozen=True)
class Job:
    """One job of the scheduler, or an array of them.

    Attributes:
        control: folder of its script, control files and logs; of an array each run has one below it.
        units: what it runs; several are an array.
        nodes, tasks: how many nodes, and ranks on each.
        after: jobs that must have ended well before.
    """

    name: str
    control: Path
    units: tuple[Unit, ...]
    nodes: int
    tasks: int
    after: tuple[str, ...] = ()

    @property
    def done(self) -> bool:
        """Whether all its runs are complete already."""
        return all(unit.done for unit in self.units)

    def control_of(self, number: int) -> Path:
        """Control files and logs of a run."""
        return self.control / str(number) if len(self.units) > 1 else self.control


@dataclass(frozen=True)
class Plan:
    """All jobs of a launch.

    Attributes:
        root: absolute; the run's folder, or that of a pipeline's stages.
    """

    name: str
    root: Path
    jobs: tuple[Job, ...]


def plan_jobs(
    recipe: str, overrides: list[str], sweep: Sequence[str], nodes: dict[str, int], default: int, tasks: int
) -> Plan:
    """Check a recipe, pipeline or ablation as ``train`` and ``ablate`` would, and make its jobs.

    Args:
        sweep: ``key=v1,v2`` each; a run for every combination of their values.
        nodes: of a stage, by its name.
        default: nodes of all others.
        tasks: ranks on a node.

    Raises:
        UserError: a mistake in the recipe, its layout on so many ranks, the data, or the arguments.
    """
    if _is_ablation(recipe):
        _no_sweep(sweep, "an ablation")
        ablation = load_ablation(recipe, overrides)
        plan = _of_pipeline(ablation.chain, ablation.out, nodes, default, tasks)
        command = ("ablate", recipe, *overrides, "--out", str(ablation.out.absolute()))
        marker = ablation.out.absolute() / "table.md"
        measured = marker.exists() and all(job.done for job in plan.jobs)
        last = Job(
            name=MEASURES,
            control=plan.root / LAUNCH_DIR / MEASURES,
            units=(Unit(command, plan.root, marker, measured),),
            nodes=1,
            tasks=1,
            after=tuple(job.name for job in plan.jobs),
        )
        return Plan(ablation.chain.name, plan.root, (*plan.jobs, last))
    if is_pipeline(recipe):
        _no_sweep(sweep, "a pipeline")
        pipeline = load_pipeline(recipe, overrides)
        return _of_pipeline(pipeline, pipeline.stages[0].folder.parent, nodes, default, tasks)
    if unknown := next(iter(nodes), None):
        raise UserError(f"--nodes {unknown}={nodes[unknown]}: {recipe} has no stages; say --nodes {nodes[unknown]}")
    return _of_recipe(recipe, overrides, sweep, default, tasks)


def _of_pipeline(pipeline: Pipeline, root: Path, nodes: dict[str, int], default: int, tasks: int) -> Plan:
    root, names = root.absolute(), [stage.name for stage in pipeline.stages]
    for name in nodes:
        if name not in names:
            raise UserError(f"--nodes {name}={nodes[name]}: there is no such stage; there are {', '.join(names)}")
    sizes = {name: nodes.get(name, default) for name in names}
    done = check_stages(pipeline, {name: sizes[name] * tasks for name in names}, here=False)
    jobs = []
    for stage in pipeline.stages:
        folder = stage.folder.absolute()
        marker = folder / (WEIGHTS_DIR if stage.teacher else COMPLETE_FILE)
        unit = Unit(tuple(arguments(stage, pipeline)), folder, marker, done[stage.name])
        jobs.append(
            Job(
                name=stage.name,
                control=root / LAUNCH_DIR / stage.name,
                units=(unit,),
                nodes=1 if stage.teacher else sizes[stage.name],
                tasks=1 if stage.teacher else tasks,
                after=stage.after,
            )
        )
    return Plan(pipeline.name, root, tuple(jobs))


def _of_recipe(recipe: str, overrides: list[str], sweep: Sequence[str], nodes: int, tasks: int) -> Plan:
    resolved = load_recipe(recipe, overrides)
    root = Path(resolved.run_dir).absolute()
    if not sweep:
        return Plan(resolved.name, root, (_job(resolved.name, root, root, [(recipe, overrides)], nodes, tasks),))
    for override in sweep:
        key, _, values = override.partition("=")
        if override_key(override) == "run_dir" or not key or not values:
            raise UserError(f"--sweep {override}: it is key=v1,v2, of any key but run_dir")
    keys = [override.partition("=")[0] for override in sweep]
    values = [override.partition("=")[2].split(",") for override in sweep]
    runs = []
    for combination in itertools.product(*values):
        given = [f"{key}={value}" for key, value in zip(keys, combination)]
        folder = root / ",".join(text.replace("/", "_") for text in given)
        runs.append((recipe, [*overrides, *given, f"run_dir={quoted(folder)}"]))
    return Plan(resolved.name, root, (_job(resolved.name, root, None, runs, nodes, tasks),))


def _job(
    name: str, root: Path, folder: Optional[Path], runs: list[tuple[str, list[str]]], nodes: int, tasks: int
) -> Job:
    units = []
    for recipe, overrides in runs:
        resolved = load_recipe(recipe, overrides)
        check_recipe(resolved, nodes * tasks)
        run_dir = Path(resolved.run_dir).absolute()
        overrides = [text for text in overrides if override_key(text) != "run_dir"] + [f"run_dir={quoted(run_dir)}"]
        stage = Stage(name, recipe, tuple(overrides), run_dir, ())
        pipeline = Pipeline(name, (stage,))
        done = check_stages(pipeline, {name: nodes * tasks}, here=False)[name]
        units.append(Unit(tuple(arguments(stage, pipeline)), run_dir, run_dir / COMPLETE_FILE, done))
    return Job(name, root / LAUNCH_DIR / name, tuple(units), nodes, tasks)


def _is_ablation(recipe: str) -> bool:
    try:
        file = resources.find_recipe(
            recipe if "/" in recipe or recipe.endswith(".yaml") else f"ablations/{recipe}", "ablation"
        )
        return "variants" in read_mapping(file, recipe)
    except UserError:
        return False


def _no_sweep(sweep: Sequence[str], what: str) -> None:
    if sweep:
        raise UserError(f"--sweep {sweep[0]}: {what} has runs of its own; sweep over a recipe")
