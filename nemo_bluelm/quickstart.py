"""Every stage, tiny, on this machine: make a corpus, train on it, answer questions about images it has not seen."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from nemo_bluelm.atomic import write_atomically
from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.parent import bound_to_this_process
from nemo_bluelm.runtime.run_dir import read_metrics, resolve_checkpoint

# Recipe and the stage whose checkpoint it starts from.
STAGES = (("align_projector", None), ("sft", "align_projector"))
REPORT_FILE = "report.json"
SMOOTHING = 10  # steps that a reported loss is the mean of
MAX_NEW_TOKENS = 64


def run(out: Path) -> int:
    """Make the corpus, run the stages through ``nemo-bluelm train``, evaluate, print a table, write report.json.

    What is already there is kept: a second call on the same folder goes on where the first one ended.

    Args:
        out: folder for ``corpus/``, ``runs/STAGE/`` and the report.

    Returns:
        Exit code: that of the first stage that failed, else 0.

    Raises:
        UserError: the folder can't be written.
    """
    console = Console(stderr=True)
    started = time.perf_counter()
    corpus = out / "corpus"
    if not corpus.exists():
        from nemo_bluelm.data.corpus import make_corpus

        console.print(f"making the corpus in {corpus}")
        try:
            out.mkdir(parents=True, exist_ok=True)
            make_corpus(corpus)
        except OSError as error:
            raise UserError(f"--out {out} can't be written: {error.strerror}; choose another folder") from error

    rows = []
    for stage, origin in STAGES:
        folders = {"data.root": corpus, "data.index": out / "index", "run_dir": _run_dir(out, stage)}
        overrides = [f"{key}={_quoted(folder)}" for key, folder in folders.items()]
        if origin is not None:
            overrides.append(f"init_from={_quoted(_run_dir(out, origin))}")
        console.print(f"training recipes/tiny/{stage}.yaml")
        command = [sys.executable, "-m", "nemo_bluelm.cli.main", "train", f"tiny/{stage}", *overrides]
        code = _wait(subprocess.Popen(command, env={**os.environ, **bound_to_this_process()}))
        if code:
            return code
        rows.append(_stage_row(out, stage, overrides))

    console.print("evaluating on held-out digits")
    evaluation = _evaluate(_run_dir(out, STAGES[-1][0]), corpus / "digits-test.tar")
    rows[-1]["held_out_accuracy"] = evaluation["accuracy"]
    report = {"stages": rows, **evaluation, "seconds": round(time.perf_counter() - started, 1)}
    write_atomically(out / REPORT_FILE, (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())
    _print(report, out / REPORT_FILE)
    return 0


def _wait(training: subprocess.Popen) -> int:
    """The exit code of a stage. Ctrl-C reaches it from the terminal, SIGTERM is passed on: it saves before it ends."""
    previous = signal.signal(signal.SIGTERM, lambda number, frame: training.send_signal(number))
    try:
        while True:
            try:
                return training.wait()
            except KeyboardInterrupt:
                continue
    finally:
        signal.signal(signal.SIGTERM, previous)


def _quoted(path: Path) -> str:
    """A value in the grammar of overrides, whatever characters it has."""
    escaped = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _run_dir(out: Path, stage: str) -> Path:
    return out / "runs" / stage


def _stage_row(out: Path, stage: str, overrides: list[str]) -> dict:
    """What a finished run says of itself; the first step, which warms caches, is left out of the speed."""
    steps = read_metrics(_run_dir(out, stage))
    losses = [step["loss"] for step in steps]
    seconds = sum(step["seconds"] for step in steps)
    timed = steps[1:] or steps
    return {
        "stage": stage,
        "steps": load_recipe(f"tiny/{stage}", overrides).train.steps,
        "loss_first": sum(losses[:SMOOTHING]) / len(losses[:SMOOTHING]),
        "loss_last": sum(losses[-SMOOTHING:]) / len(losses[-SMOOTHING:]),
        "tokens_per_second": sum(s["tokens"] for s in timed) / sum(s["seconds"] for s in timed),
        "seconds": round(seconds, 1),
    }


def _evaluate(run_dir: Path, shard: Path) -> dict:
    """Exact-match accuracy without thinking, and one reply in each mode to the first held-out image."""
    from nemo_bluelm.data.records import read_records
    from nemo_bluelm.generate.generator import Prompt, open_generator

    questions = [(record.messages, images) for _, record, images in read_records(shard)]
    prompts = [Prompt(messages[:-1], images) for messages, images in questions]
    expected = [messages[-1]["content"] for messages, _ in questions]
    with open_generator(resolve_checkpoint(str(run_dir), "run_dir")) as generator:
        replies = generator.generate(prompts, MAX_NEW_TOKENS)
        thinking = generator.generate([Prompt(prompts[0].messages, prompts[0].images, think=True)], MAX_NEW_TOKENS)[0]
    right = sum(reply.thought is None and reply.answer == answer for reply, answer in zip(replies, expected))
    return {
        "accuracy": right / len(expected),
        "held_out_images": len(expected),
        "example": {
            "expected": expected[0],
            "non_thinking": vars(replies[0]),
            "thinking": vars(thinking),
        },
    }


def _print(report: dict, path: Path) -> None:
    table = Table(Column("stage", no_wrap=True), "steps", "loss", "tokens/s", "seconds", "held-out accuracy")
    for row in report["stages"]:
        accuracy = f"{row['held_out_accuracy']:.3f}" if "held_out_accuracy" in row else ""
        loss = f"{row['loss_first']:.3f} -> {row['loss_last']:.3f}"
        speed = f"{row['tokens_per_second']:,.0f}"
        table.add_row(row["stage"], str(row["steps"]), loss, speed, f"{row['seconds']:.0f}", accuracy)
    console = Console()
    console.print(table)
    example = report["example"]
    console.print(f"held-out digit {example['expected']}, not thinking: {example['non_thinking']['answer']}")
    thinking = example["thinking"]
    thought = "" if thinking["thought"] is None else f"<think>{thinking['thought']}</think>"
    console.print(f"held-out digit {example['expected']}, thinking: {thought}{thinking['answer']}", markup=False)
    console.print(f"{report['seconds']:.0f} s in all; written to {path}")
