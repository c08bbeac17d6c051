"""Train one recipe: the entry point of every rank."""

import contextlib
import gc
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO

from nemo_bluelm.atomic import write_atomically
from nemo_bluelm.config.checks import check_machine, check_recipe
from nemo_bluelm.config.compose import to_yaml
from nemo_bluelm.config.schema import DecodeDevice, Dtype, Recipe
from nemo_bluelm.errors import UserError
from nemo_bluelm.locks import hold_lock
from nemo_bluelm.runtime.environment import Launch, prepare, quiet
from nemo_bluelm.runtime.recovery import Ranks, check_whole, newest_whole, published_steps
from nemo_bluelm.runtime.run_dir import COMPLETE_FILE, LOCK_FILE, RECIPE_FILE, TOKENIZER_FILE, step_of
from nemo_bluelm.train.continuity import check_frozen, check_init, check_resume, find_origins, resume_notices
from nemo_bluelm.train.events import note, write_environment
from nemo_bluelm.train.guards import positions_notice
from nemo_bluelm.train.job import Job, NextToken
from nemo_bluelm.train.loggers import check_loggers


def train(recipe: Recipe, make_job: Callable[[Recipe], Job] = NextToken) -> int:
    """Run a recipe to its last step, going on from the newest checkpoint in its run folder if there is one.

    Args:
        make_job: opens what the recipe trains on.

    Returns:
        Exit code: 0, or 128 + signal number when Ctrl-C or SIGTERM ended the run early with a checkpoint.

    Raises:
        UserError: recipe, data, checkpoint or folder can't be used.
    """
    launch = Launch.from_environment()
    rank = launch.rank
    check_recipe(recipe, launch.world_size)
    check_machine(recipe)
    run_dir = Path(recipe.run_dir).absolute()
    check_loggers(recipe.log)
    ranks = Ranks(launch)
    steps = published_steps(run_dir, ranks)
    lock = _lock(run_dir) if steps and rank == 0 else None
    resume_from = newest_whole(run_dir, steps, ranks) if steps else None
    if resume_from:
        check_resume(recipe, resume_from)
        if step_of(resume_from) >= recipe.train.steps:
            if rank == 0:
                _mark_complete(run_dir, step_of(resume_from))
                print(f"{recipe.name} is complete: {resume_from} holds its last step")
            return 0
    origins = [] if resume_from else find_origins(recipe)
    for origin in origins:
        check_whole(origin, ranks)

    quiet()
    if recipe.data.decode.device == DecodeDevice.gpu:
        import torch

        torch.cuda.set_device(launch.local_rank)  # the decode backend takes the current one
    job = make_job(recipe)
    for origin in origins:
        check_init(recipe, origin, job.tokenizer.content)
    if resume_from is None and job.sees_images:
        check_frozen(recipe, origins)
    notices = [*(positions_notice(recipe, origin) for origin in origins), *job.notices()]
    notices += resume_notices(recipe, resume_from) if resume_from else []
    recipe_yaml = to_yaml(recipe).encode()
    if rank == 0:
        lock = lock or _lock(run_dir)
        with _writable(run_dir):
            (run_dir / COMPLETE_FILE).unlink(missing_ok=True)  # of fewer steps
            write_atomically(run_dir / RECIPE_FILE, recipe_yaml)
            write_environment(run_dir, launch)
            note(run_dir, "start", step_of(resume_from) if resume_from else 0, f"{launch.world_size} ranks")
    for notice in notices if rank == 0 else ():
        if notice:
            print(f"{recipe.name}  {notice}", file=sys.stderr)

    prepare()
    from nemo_bluelm.runtime.checkpoints import Checkpoints
    from nemo_bluelm.runtime.storage import writing
    from nemo_bluelm.train.interrupt import StopOnSignal
    from nemo_bluelm.train.loggers import Loggers
    from nemo_bluelm.train.metrics import Metrics

    options = recipe.train
    files = {RECIPE_FILE: recipe_yaml, TOKENIZER_FILE: job.tokenizer.content}
    checkpoints = Checkpoints(run_dir, files, options.save_every, options.keep_checkpoints, options.keep_every)
    stop = StopOnSignal(checkpoints)
    metrics = Metrics(
        run_dir,
        recipe.name,
        options.steps,
        options.log_every,
        ends_on_nan=not options.skip_bad_steps,
        open_loggers=partial(Loggers, recipe, run_dir),
    )
    guards = _guards(recipe, run_dir)
    try:
        with writing(run_dir):
            steps = fit(job, [metrics, *job.callbacks(checkpoints), checkpoints, stop, *guards], origins, resume_from)
    finally:
        job.close()
    if lock is not None:
        lock.close()
    if stop.received:
        if rank == 0:
            name = signal.Signals(stop.received).name
            print(
                f"{recipe.name} was stopped by {name} and saved; the same command goes on from there", file=sys.stderr
            )
        return 128 + stop.received
    if steps < recipe.train.steps:
        raise UserError(job.ended_early(steps))
    if rank == 0:
        _mark_complete(run_dir, steps)
    return 0


def fit(job: Job, callbacks: list, origins=(), resume_from=None) -> int:
    """Build model, optimizer and trainer of a job and train; ``prepare`` must have been called.

    Args:
        callbacks: Lightning callbacks.
        origins: where the weights of a fresh run come from.
        resume_from: checkpoint folder to go on from, with optimizer and data position.

    Returns:
        The step it came to.
    """
    import torch
    from megatron.core.optimizer import OptimizerConfig

    from nemo_bluelm.runtime.optimizer import Optimizer
    from nemo_bluelm.runtime.param_groups import Multipliers
    from nemo_bluelm.runtime.strategy import build_strategy, build_trainer
    from nemo_bluelm.train.schedules import LearningRate

    recipe, optim = job.recipe, job.recipe.optim
    bf16 = recipe.precision.dtype == Dtype.bf16
    multipliers = Multipliers(optim, recipe.model.vision.num_layers)
    optimizer = Optimizer(
        share_tiles=recipe.parallel.share_tiles,
        multipliers=multipliers,
        config=OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            weight_decay=multipliers.weight_decay,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_eps=optim.eps,
            clip_grad=optim.clip_grad,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=recipe.parallel.distributed_optimizer,
        ),
        lr_scheduler=LearningRate(recipe.train.steps, optim, job.tokens_per_step),
    )
    trainer = build_trainer(recipe, build_strategy(recipe, origins), callbacks)
    # A full collection among millions of objects that stay takes 0.3 s, in any step of any rank; all others wait.
    gc.freeze()
    try:
        trainer.fit(job.module(optimizer), job.data_module(), ckpt_path=str(resume_from) if resume_from else None)
        return trainer.global_step
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _guards(recipe: Recipe, run_dir: Path) -> list:
    """Callbacks for what may go wrong with steps, ranks and GPUs."""
    from nemo_bluelm.train.bad_steps import BadSteps
    from nemo_bluelm.train.resiliency import resiliency_callbacks
    from nemo_bluelm.train.watchdog import Watchdog

    name, options = recipe.name, recipe.train
    guards = resiliency_callbacks(run_dir, options.straggler_report)
    if options.skip_bad_steps:
        guards.append(BadSteps(run_dir, name, options.skip_bad_steps, options.spike_factor))
    if options.hang_timeout:
        guards.append(Watchdog(run_dir, name, options.hang_timeout))
    return guards


def _mark_complete(run_dir: Path, step: int) -> None:
    with _writable(run_dir):
        write_atomically(run_dir / COMPLETE_FILE, f"{step}\n".encode())


def _lock(run_dir: Path) -> IO[bytes]:
    """Make the folder and hold its lock as long as the returned file is open."""
    with _writable(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / LOCK_FILE).open("wb")
        try:
            hold_lock(file.fileno(), run_dir, wait=False)
        except BlockingIOError:
            raise UserError(
                f"run_dir {run_dir} is in use by another run; wait for it, or choose another run_dir"
            ) from None
        return file


@contextlib.contextmanager
def _writable(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"run_dir {run_dir} can't be written: {error.strerror}; set run_dir to a writable folder"
        ) from error
