"""One line a step in metrics.jsonl, and progress for the person who watches."""

import json
import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from megatron.core import parallel_state
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nemo_bluelm.atomic import write_atomically
from nemo_bluelm.runtime.run_dir import METRICS_FILE


class Metrics(Callback):
    """Writes step, loss, lr, grad_norm, tokens, seconds and tokens_per_second of every step on rank 0.

    ``loss`` is the mean over all target tokens of the global batch; ``tokens`` counts real tokens, not padding;
    ``bad_samples`` counts those met since the run was started or resumed.
    A resumed run drops the lines after its checkpoint, so that the file reads like one uninterrupted run.
    """

    def __init__(self, run_dir: Path, name: str, steps: int, log_every: int):
        self.path = run_dir / METRICS_FILE
        self.name, self.steps, self.log_every = name, steps, log_every

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        module.real_tokens = 0
        if not trainer.is_global_zero:
            return
        kept = []
        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= trainer.global_step]
        write_atomically(self.path, "".join(kept).encode())
        self.file = self.path.open("a", buffering=1)
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
        self.started = time.perf_counter()
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int) -> None:
        loss = outputs["loss"].detach().clone().float()
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            group = parallel_state.get_pipeline_model_parallel_group()
            torch.distributed.broadcast(loss, parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
        counts = torch.tensor([module.real_tokens, trainer.datamodule.loader.bad_samples], device=loss.device)
        torch.distributed.all_reduce(counts, group=parallel_state.get_data_parallel_group())
        tokens, bad_samples = counts.tolist()
        module.real_tokens = 0
        if trainer.is_global_zero:
            seconds = time.perf_counter() - self.started
            self._report(
                step=trainer.global_step,
                loss=loss.item(),
                lr=self.lr,
                grad_norm=float(trainer.callback_metrics.get("grad_norm", float("nan"))),
                tokens=tokens,
                seconds=seconds,
                tokens_per_second=tokens / seconds,
                bad_samples=bad_samples,
            )

    def _report(self, **row) -> None:
        self.file.write(json.dumps(row) + "\n")
        report = f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  {row['tokens_per_second']:,.0f} tokens/s"
        if row["bad_samples"]:
            report += f"  {row['bad_samples']} bad samples"
        self.progress.update(self.task, completed=row["step"], report=report)
        if not self.console.is_terminal and (row["step"] % self.log_every == 0 or row["step"] == self.steps):
            print(f"{self.name}  step {row['step']}/{self.steps}  {report}", file=sys.stderr, flush=True)

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero and hasattr(self, "file"):
            self.progress.stop()
            self.file.close()
