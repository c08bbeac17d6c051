"""One line a step in metrics.jsonl, and progress for the person who watches."""

import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from megatron.core import parallel_state
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nemo_bluelm.atomic import write_atomically
from nemo_bluelm.errors import UserError
from nemo_bluelm.model.flops import peak_flops
from nemo_bluelm.runtime.later import Later, Stamp, to_device
from nemo_bluelm.runtime.run_dir import METRICS_FILE, read_metrics
from nemo_bluelm.train.loggers import Loggers


@dataclass
class _Step:
    """A step whose numbers the host doesn't have yet."""

    number: int
    lr: float
    tokens_by_source: dict[str, int]
    sources: tuple[str, ...]
    sums: Later  # loss, each source's, gradient norm, then tokens, bad samples and FLOPs over all data-parallel ranks
    others: dict[str, Later]  # other losses
    begun: Stamp
    ended: Stamp


class Metrics(Callback):
    """Writes step, loss, loss_by_source, lr, grad_norm, tokens, tokens_by_source, seconds, tokens_per_second, tflops,
    mfu and bad_samples of every step.

    A step is reported at the end of the next one, so that the host needn't wait for the GPU; the last one at the end,
    and every one before its checkpoint is published.

    - ``loss`` is the mean over all target tokens of the global batch; ``tokens`` counts real tokens, not padding.
    - ``loss_by_source`` has the mean of each source that the step had targets of; not in runs of another objective.
    - ``tokens_by_source`` has those of all steps of the run so far, as {name in data.sources: tokens}.
    - ``lr`` is the schedule's, before what ``optim.parts`` and ``optim.vision_layer_decay`` make of it.
    - ``seconds`` is the time from the end of the step before, on the GPU's clock, with what a checkpoint holds it up.
    - ``tflops`` is model FLOPs (``nemo_bluelm.model.flops``) a second and GPU, in 10^12; ``mfu`` the share that is of
      the device's dense BF16 peak, null where that is not known.
    - a run that distills adds ``cross_entropy`` and ``divergence``, of which its loss is made.
    - ``bad_samples`` counts those met since the run was started or resumed.

    Rank 0 writes. A resumed run drops the lines after its checkpoint, so that the file reads like one uninterrupted
    run.

    Args:
        open_loggers: called with the step that the run goes on from; None for none.
        ends_on_nan: whether a loss or gradient norm that is NaN or infinite is an error; else it is null in the file.

    Raises:
        UserError: it is; on all ranks, and before the step's checkpoint is published.
    """

    def __init__(
        self,
        run_dir: Path,
        name: str,
        steps: int,
        log_every: int,
        ends_on_nan: bool = True,
        open_loggers: Optional[Callable[[int], Loggers]] = None,
    ):
        self.run_dir, self.path = run_dir, run_dir / METRICS_FILE
        self.name, self.steps, self.log_every, self.ends_on_nan = name, steps, log_every, ends_on_nan
        self._open_loggers = open_loggers
        self._mark: Optional[Stamp] = None  # end of the step before
        self._step: Optional[_Step] = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        module.real_tokens = module.model_flops = 0
        self.gpus = torch.distributed.get_world_size()
        self.peak = peak_flops(torch.cuda.get_device_name()) if module.device.type == "cuda" else None
        if not trainer.is_global_zero:
            return
        rows = read_metrics(self.run_dir) if self.path.exists() else []
        kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= trainer.global_step]
        write_atomically(self.path, "".join(kept).encode())
        self.file = self.path.open("a", buffering=1)
        self.loggers = self._open_loggers(trainer.global_step) if self._open_loggers else None
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[report]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task(self.name, total=self.steps, completed=trainer.global_step, report="")
        self.progress.start()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch, batch_idx: int) -> None:
        if self._mark is None:
            self._mark = Stamp(module.device)
        group = trainer.optimizers[0].param_groups[0]
        self.lr = group["lr"] / group["pre_lr_mult"]  # NeMo's name for what Megatron multiplied it with

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int) -> None:
        loss = torch.cat((outputs["loss"].detach().double().reshape(1), module.loss_by_source().double()))
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            group = parallel_state.get_pipeline_model_parallel_group()
            torch.distributed.broadcast(loss, parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
        bad_samples = trainer.datamodule.bad_samples
        sums = to_device([module.real_tokens, bad_samples, module.model_flops], loss.device)
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        module.real_tokens = module.model_flops = 0
        begun, self._mark = self._mark, Stamp(loss.device)
        step = _Step(
            number=trainer.global_step,
            lr=self.lr,
            tokens_by_source=trainer.datamodule.tokens_by_source(),
            sources=module.sources,
            sums=Later(torch.cat((loss, trainer.strategy.grad_norm.reshape(1), sums))),
            others={name: Later(value.reshape(1).clone()) for name, value in module.other_losses().items()},
            begun=begun,
            ended=self._mark,
        )
        self._settle(trainer)
        self._step = step

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._settle(trainer)

    def _settle(self, trainer: Trainer) -> None:
        """Report the step that waits for it, if there is one."""
        step, self._step = self._step, None
        if step is None:
            return
        loss, *by_source, grad_norm, tokens, bad_samples, flops = step.sums.get()
        for what, value in (("loss", loss), ("gradient", grad_norm)):
            if self.ends_on_nan and not math.isfinite(value):
                raise UserError(
                    f"the {what} of the run in {self.run_dir} became NaN or infinite in step {step.number}; lower "
                    "optim.lr, or set optim.clip_grad or optim.warmup_steps, in a new run_dir"
                )
        if not trainer.is_global_zero:
            return
        seconds = step.begun.seconds_until(step.ended)
        rate = flops / seconds / self.gpus
        self._report(
            step=step.number,
            loss=loss,
            **({"loss_by_source": _finite(zip(step.sources, by_source))} if step.sources else {}),
            lr=step.lr,
            grad_norm=grad_norm,
            tokens=int(tokens),
            tokens_by_source=step.tokens_by_source,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            tflops=rate / 1e12,
            mfu=rate / self.peak if self.peak else None,
            bad_samples=int(bad_samples),
            **{name: value.get()[0] for name, value in step.others.items()},
        )

    def _report(self, **row) -> None:
        numbers = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }
        self.file.write(json.dumps(numbers) + "\n")
        if self.loggers is not None:
            self.loggers.write(numbers)
        report = f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  {row['tokens_per_second']:,.0f} tokens/s"
        if row["mfu"] is not None:
            report += f"  {row['tflops']:.0f} TFLOP/s  {row['mfu']:.1%} MFU"
        if row["bad_samples"]:
            report += f"  {row['bad_samples']} bad samples"
        self.progress.update(self.task, completed=row["step"], report=report)
        if not self.console.is_terminal and (row["step"] % self.log_every == 0 or row["step"] == self.steps):
            print(f"{self.name}  step {row['step']}/{self.steps}  {report}", file=sys.stderr, flush=True)

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero and hasattr(self, "file"):
            self.progress.stop()
            self.file.close()
            if self.loggers is not None:
                self.loggers.close()


def _finite(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    return {name: value for name, value in values if math.isfinite(value)}
