"""Measures training itself: the recipe's run, through the real loader, in processes of its own."""

import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from nemo_bluelm.bench.case import OUT_OF_MEMORY, Start, write_case
from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.config.schema import Recipe


def measure(
    recipe: Recipe,
    steps: int,
    warmup: int,
    start: Start,
    profile: Path | None = None,
    save_every: int | None = None,
) -> dict:
    """Train for ``warmup + steps`` steps and return what the last ``steps`` of them say. Nothing is kept.

    Args:
        start: starts the processes.
        profile: write the longest kernels of one more step there, which doesn't count.
        save_every: steps between checkpoints, which are deleted once they are published; None makes none.

    Returns:
        ``name``, ``environment``, ``layout``, ``precision``, ``packs``, ``processes``, ``steps``, ``warmup``; what
        :func:`nemo_bluelm.bench.figures.rates` gives; ``seconds`` of every counted step; ``memory`` of rank 0;
        ``data_wait`` {seconds, fraction of the time}; ``loss`` {first, last}; ``parameters`` of rank 0 by part;
        ``checkpoints`` {every, stalls: seconds by which each made the steps up to the next one longer than the median
        step; longest, of_a_step: see :func:`nemo_bluelm.bench.figures.stalls`} where they were made. Or ``name``
        and ``error``.

    Raises:
        UserError: the run refused the recipe or its data.
    """
    with tempfile.TemporaryDirectory(prefix="nemo-bluelm-bench-") as folder:
        result = Path(folder) / "result.json"
        total = warmup + steps + (profile is not None)
        case = write_case(_timed(recipe, total, Path(folder) / "run"), Path(folder))
        arguments = ["bench", "train", str(case), "--steps", str(steps), "--warmup", str(warmup)]
        arguments += ["--worker", str(result)]
        arguments += ["--profile", str(Path(profile).absolute())] if profile else []
        arguments += ["--save-every", str(save_every)] if save_every else []
        code = start(arguments)
        if not result.exists():
            return {"name": recipe.name, "error": f"the run ended with exit code {code}"}
        return json.loads(result.read_text())


def measure_here(path: str, steps: int, warmup: int, result: Path, profile: Path | None, save_every: int | None) -> int:
    """What :func:`measure` runs: train as this rank; rank 0 writes ``result``, and any rank whose memory runs out."""
    from nemo_bluelm.config.checks import check_machine, check_recipe
    from nemo_bluelm.runtime.environment import Launch, prepare, quiet
    from nemo_bluelm.train.job import NextToken
    from nemo_bluelm.train.packs import open_packs
    from nemo_bluelm.train.run import fit

    quiet()
    launch, recipe = Launch.from_environment(), load_recipe(path, [])
    check_recipe(recipe, launch.world_size)
    check_machine(recipe)
    if launch.rank == 0:
        Path(recipe.run_dir).mkdir(parents=True, exist_ok=True)
    _choose_device(launch.local_rank)
    loader = open_packs(recipe)
    prepare()
    from nemo_bluelm.bench.figures import is_out_of_memory, stalls
    from nemo_bluelm.bench.watch import Watch
    from nemo_bluelm.runtime.checkpoints import Checkpoints
    from nemo_bluelm.train.metrics import Metrics

    watch = Watch(recipe.train.steps, profile)
    metrics = Metrics(Path(recipe.run_dir), recipe.name, recipe.train.steps, recipe.train.log_every)
    checkpoints = [Checkpoints(Path(recipe.run_dir), {}, save_every, keep=0)] if save_every else []
    try:
        fit(NextToken(recipe, loader), [watch, metrics, *checkpoints])
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        result.write_text(json.dumps({"name": recipe.name, "error": OUT_OF_MEMORY, **_settings(recipe, launch)}))
        return 1
    if launch.rank == 0:
        counted = slice(warmup, warmup + steps)
        report = _report(recipe, launch, watch, counted)
        if save_every:
            report["checkpoints"] = {"every": save_every, **stalls(report["seconds"], warmup, save_every)}
        result.write_text(json.dumps(report))
    return 0


def _timed(recipe: Recipe, steps: int, run_dir: Path) -> Recipe:
    """The recipe for ``steps`` steps that leave nothing behind."""
    train = replace(recipe.train, steps=steps, log_every=5)
    optim = replace(recipe.optim, warmup_steps=min(recipe.optim.warmup_steps, steps))
    return replace(recipe, train=train, optim=optim, run_dir=str(run_dir), init_from=None, init_vision_from=None)


def _choose_device(local_rank: int) -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)


def _report(recipe: Recipe, launch, watch, counted: slice) -> dict:
    from nemo_bluelm.bench.figures import peak_memory, rates
    from nemo_bluelm.bench.machine import device_name, training_environment
    from nemo_bluelm.model.flops import peak_flops
    from nemo_bluelm.runtime.run_dir import read_metrics

    everything = read_metrics(Path(recipe.run_dir))
    rows, waited, gpus = everything[counted], watch.waited[counted], launch.world_size
    seconds, tokens = [row["seconds"] for row in rows], [row["tokens"] for row in rows]
    flops = [row["tflops"] * 1e12 * gpus * row["seconds"] for row in rows]
    return {
        "name": recipe.name,
        **_settings(recipe, launch),
        "warmup": counted.start,
        "steps": len(rows),
        **rates(seconds, tokens, flops, gpus, peak_flops(device_name())),
        "memory": peak_memory(),
        "data_wait": {
            "seconds": round(sum(waited) / len(waited), 5),
            "fraction": round(sum(waited) / sum(seconds), 4),
        },
        "loss": {"first": everything[0]["loss"], "last": rows[-1]["loss"]},
        "losses": [row["loss"] for row in everything],
        "parameters": watch.parameters,
        "seconds": [round(value, 5) for value in seconds],
        "tokens": tokens,
        "environment": training_environment(),
    }


def _settings(recipe: Recipe, launch) -> dict:
    train, data = recipe.train, recipe.data
    return {
        "processes": launch.world_size,
        "layout": _plain(asdict(recipe.parallel)),
        "precision": _plain(asdict(recipe.precision)),
        "packs": {
            "sequence_length": data.sequence_length,
            "micro_batch_size": train.micro_batch_size,
            "global_batch_size": train.global_batch_size,
        },
        "recompute": _plain(asdict(train.recompute)),
        "cuda_graphs": train.cuda_graphs,
        "frozen": [part.value for part in train.freeze],
    }


def _plain(values):
    """Choices as text."""
    if isinstance(values, dict):
        return {key: _plain(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_plain(value) for value in values]
    return getattr(values, "value", values)
