"""Train one recipe: the entry point of every rank."""

import fcntl
import signal
import sys
from pathlib import Path
from typing import IO

from nemo_bluelm.atomic import write_atomically
from nemo_bluelm.config.checks import alignment, check_machine, check_recipe
from nemo_bluelm.config.compose import to_yaml
from nemo_bluelm.config.schema import DecodeDevice, Dtype, Recipe, geometry_of
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.environment import Launch, prepare, quiet
from nemo_bluelm.runtime.run_dir import (
    LOCK_FILE,
    RECIPE_FILE,
    TOKENIZER_FILE,
    newest,
    resolve_checkpoint,
    step_of,
)
from nemo_bluelm.train.continuity import check_init, check_resume
from nemo_bluelm.train.guards import text_share_notice
from nemo_bluelm.train.teachers import check_teacher


def train(recipe: Recipe) -> int:
    """Run a recipe to its last step, going on from the newest checkpoint in its run folder if there is one.

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
    resume_from = newest(run_dir)
    if resume_from is not None:
        check_resume(recipe, resume_from)
        if step_of(resume_from) >= recipe.train.steps:
            if rank == 0:
                print(f"{recipe.name} is complete: {resume_from} holds its last step")
            return 0
    init_from = resolve_checkpoint(recipe.init_from, "init_from") if recipe.init_from else None

    quiet()
    if recipe.data.decode.device == DecodeDevice.gpu:
        import torch

        torch.cuda.set_device(launch.local_rank)  # the decode backend takes the current one
    loader = open_data(recipe)
    if init_from is not None:
        check_init(recipe, init_from, loader.tokenizer.content)
    if recipe.distill.teacher is not None:
        check_teacher(recipe, loader.tokenizer.content)
    notices = [text_share_notice(recipe, loader.plan.text_share()), *(table.unused() for table in loader.plan.tables)]
    recipe_yaml = to_yaml(recipe).encode()
    lock = _open_run_dir(run_dir, recipe_yaml) if rank == 0 else None
    for notice in notices if rank == 0 else ():
        if notice:
            print(f"{recipe.name}  {notice}", file=sys.stderr)

    prepare()
    from nemo_bluelm.runtime.checkpoints import Checkpoints
    from nemo_bluelm.runtime.storage import writing
    from nemo_bluelm.train.interrupt import StopOnSignal
    from nemo_bluelm.train.metrics import Metrics

    files = {RECIPE_FILE: recipe_yaml, TOKENIZER_FILE: loader.tokenizer.content}
    checkpoints = Checkpoints(run_dir, files, recipe.train.save_every, recipe.train.keep_checkpoints)
    stop = StopOnSignal(checkpoints)
    metrics = Metrics(run_dir, recipe.name, recipe.train.steps, recipe.train.log_every)
    with writing(run_dir):
        steps = fit(recipe, loader, [metrics, checkpoints, stop], init_from, resume_from)
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
        raise UserError(
            f"the data ends after {steps} of {recipe.train.steps} steps, which are saved in {run_dir}: every source "
            "has been gone through data.sources.NAME.max_epochs times; raise it in a new run_dir, or set "
            f"train.steps={steps}"
        )
    return 0


def fit(recipe: Recipe, loader, callbacks: list, init_from=None, resume_from=None) -> int:
    """Build model, optimizer and trainer for a recipe and train; ``prepare`` must have been called.

    Args:
        loader: the run's PackLoader.
        callbacks: Lightning callbacks.
        init_from: checkpoint folder whose weights a fresh run starts from.
        resume_from: checkpoint folder to go on from, with optimizer and data position.

    Returns:
        The step it came to.
    """
    import torch
    from megatron.core.optimizer import OptimizerConfig

    from nemo_bluelm.runtime.data import PackDataModule
    from nemo_bluelm.runtime.optimizer import Optimizer
    from nemo_bluelm.runtime.param_groups import Multipliers
    from nemo_bluelm.runtime.strategy import build_strategy, build_trainer
    from nemo_bluelm.train.distill import module_class
    from nemo_bluelm.train.losses import TokenLoss
    from nemo_bluelm.train.schedules import LearningRate

    optim = recipe.optim
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
        lr_scheduler=LearningRate(
            recipe.train.steps, optim, recipe.train.global_batch_size * recipe.data.sequence_length
        ),
    )
    model = module_class(recipe)(recipe, loader.tokenizer.image, TokenLoss, optimizer)
    trainer = build_trainer(recipe, build_strategy(recipe, init_from), callbacks)
    decode = recipe.data.decode
    sizes = recipe.train.global_batch_size, recipe.train.micro_batch_size
    data = PackDataModule(loader, *sizes, decode.threads, decode.prefetch)
    try:
        trainer.fit(model, data, ckpt_path=str(resume_from) if resume_from else None)
        return trainer.global_step
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def open_data(recipe: Recipe):
    """The run's PackLoader, its tokenizer checked against the model.

    Raises:
        UserError: as ``nemo_bluelm.data.open.open_data``; a tokenizer with more tokens than the model has rows; stored
            logits of something else.
    """
    from nemo_bluelm.data import open as data
    from nemo_bluelm.data.progress import Lines
    from nemo_bluelm.data.teacher_logits import TeacherLogits

    progress = Lines() if Launch.from_environment().rank == 0 else None
    loader = data.open_data(recipe.data, geometry_of(recipe.model), recipe.seed, alignment(recipe), progress)
    rows = recipe.model.language.vocab_size
    if loader.tokenizer.vocab_size > rows:
        raise UserError(
            f"model.language.vocab_size is {rows}, but the tokenizer in data.root has {loader.tokenizer.vocab_size} "
            "tokens; raise model.language.vocab_size or choose another tokenizer"
        )
    distill = recipe.distill
    if distill.logits is not None:
        at_one = distill.temperature == 1 and distill.temperature_end in (None, 1)
        loader.teacher = TeacherLogits(Path(distill.logits), loader, distill.top_k, rows, at_one)
    return loader


def _open_run_dir(run_dir: Path, recipe_yaml: bytes) -> IO[bytes]:
    """Make the folder, write the resolved recipe, and hold its lock as long as the returned file is open."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / LOCK_FILE).open("wb")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        write_atomically(run_dir / RECIPE_FILE, recipe_yaml)
        return lock
    except BlockingIOError:
        raise UserError(f"run_dir {run_dir} is in use by another run; wait for it, or choose another run_dir") from None
    except OSError as error:
        raise UserError(
            f"run_dir {run_dir} can't be written: {error.strerror}; set run_dir to a writable folder"
        ) from error
