"""Every stage, tiny, on this machine: make a corpus, train on it, measure what was learnt on what was held out."""

import json
import time
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table

from nemo_bluelm.atomic import write_atomically
from nemo_bluelm.config.pipeline import Stage, load_pipeline, quoted
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.run_dir import read_metrics, resolve_checkpoint
from nemo_bluelm.train.chain import load_stage, run_pipeline

PIPELINE = "tiny/pipeline"
REPORT_FILE = "report.json"
SMOOTHING = 10  # steps that a reported loss is the mean of
MAX_NEW_TOKENS = 64
QUESTIONS = 100  # of the held-out problems, asked in both modes
NEEDLE_LENGTHS, NEEDLE_DEPTHS, NEEDLES = (512, 2560), (0.1, 0.5, 0.9), 8  # tokens; documents of each length and depth


def run(out: Path, overrides: list[str]) -> int:
    """Make the corpus, run the tiny pipeline, evaluate, print tables, write report.json.

    What is already there is kept: a second call on the same folder goes on where the first one ended.

    Args:
        out: folder for ``corpus/``, ``runs/STAGE/`` and the report.
        overrides: of the pipeline, as ``nemo_bluelm.config.pipeline.load_pipeline`` takes them.

    Returns:
        Exit code: that of the first stage that failed, else 0.

    Raises:
        UserError: the folder can't be written; a mistake in the overrides.
    """
    console = Console(stderr=True)
    started = time.perf_counter()
    corpus = out / "corpus"
    folders = {"data.root": corpus, "data.index": out / "index", "run_dir": out / "runs"}
    pipeline = load_pipeline(PIPELINE, [*(f"{key}={quoted(folder)}" for key, folder in folders.items()), *overrides])
    if not corpus.exists():
        from nemo_bluelm.data.corpus import make_corpus

        console.print(f"making the corpus in {corpus}")
        try:
            out.mkdir(parents=True, exist_ok=True)
            make_corpus(corpus)
        except OSError as error:
            raise UserError(f"--out {out} can't be written: {error.strerror}; choose another folder") from error
    if code := run_pipeline(pipeline, nproc=1):
        return code

    rows = [_stage_row(stage) for stage in pipeline.stages if stage.teacher is None]
    console.print("evaluating on what was held out")
    evaluation = _evaluate(pipeline.stages[-1].folder, corpus)
    rows[-1]["held_out_accuracy"] = evaluation["accuracy"]
    for row in rows:
        row["held_out_text_loss"] = _text_loss(pipeline.stage(row["stage"]).folder, corpus)
    report = {"stages": rows, **evaluation, "seconds": round(time.perf_counter() - started, 1)}
    write_atomically(out / REPORT_FILE, (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())
    _print(report, out / REPORT_FILE)
    return 0


def _stage_row(stage: Stage) -> dict:
    """What a finished run says of itself; the first step, which warms caches, is left out of the speed."""
    steps = read_metrics(stage.folder)
    losses = [step["loss"] for step in steps]
    seconds = sum(step["seconds"] for step in steps)
    timed = steps[1:] or steps
    return {
        "stage": stage.name,
        "steps": load_stage(stage).train.steps,
        "loss_first": sum(losses[:SMOOTHING]) / len(losses[:SMOOTHING]),
        "loss_last": sum(losses[-SMOOTHING:]) / len(losses[-SMOOTHING:]),
        "tokens_per_second": sum(s["tokens"] for s in timed) / sum(s["seconds"] for s in timed),
        "seconds": round(seconds, 1),
    }


def _evaluate(run_dir: Path, corpus: Path) -> dict:
    """What the last stage's model can do.

    Exact-match accuracy on digits without thinking, one reply in each mode to the first of them, replies to held-out
    problems in both modes, and numbers found in documents as long as a text before the long-context stage and longer.
    """
    from nemo_bluelm.evaluate.control import as_rows, control_obedience
    from nemo_bluelm.evaluate.needle import found_by_length, needle_retrieval
    from nemo_bluelm.generate.generator import Prompt, open_generator

    questions = [(record.messages, images) for record, images in _records(corpus / "digits-test.tar")]
    problems = [(record, images) for record, images in _records(corpus / "reasoning-test.tar") if not images]
    prompts = [Prompt(messages[:-1], images) for messages, images in questions]
    expected = [messages[-1]["content"] for messages, _ in questions]
    with open_generator(resolve_checkpoint(str(run_dir), "run_dir")) as generator:
        replies = generator.generate(prompts, MAX_NEW_TOKENS)
        thinking = generator.generate([Prompt(prompts[0].messages, prompts[0].images, think=True)], MAX_NEW_TOKENS)[0]
        modes = as_rows(control_obedience(generator, problems[:QUESTIONS]))
        needles = needle_retrieval(generator, _texts(corpus), NEEDLE_LENGTHS, NEEDLE_DEPTHS, NEEDLES)
    right = sum(reply.thought is None and reply.answer == answer for reply, answer in zip(replies, expected))
    return {
        "accuracy": right / len(expected),
        "held_out_images": len(expected),
        "problems": modes,
        "needles_found": {str(length): found for length, found in found_by_length(needles).items()},
        "example": {
            "expected": expected[0],
            "non_thinking": vars(replies[0]),
            "thinking": vars(thinking),
        },
    }


def _text_loss(run_dir: Path, corpus: Path) -> float:
    """Nats per token of held-out text, after a stage."""
    from nemo_bluelm.evaluate.text_loss import loss_by_position
    from nemo_bluelm.generate.generator import open_generator

    with open_generator(resolve_checkpoint(str(run_dir), "run_dir")) as generator:
        spans = loss_by_position(generator, _texts(corpus), length=512, spans=1)
    return spans[0].loss


def _records(shard: Path) -> list[Any]:
    from nemo_bluelm.data.records import read_records

    return [(record, images) for _, record, images in read_records(shard)]


def _texts(corpus: Path) -> list[str]:
    """The held-out texts."""
    return [record.text for record, _ in _records(corpus / "text-test.tar")]


def _print(report: dict, path: Path) -> None:
    columns = ("stage", "steps", "loss", "tokens/s", "seconds", "text loss")
    table = Table(*(Column(name, no_wrap=True) for name in columns), box=box.SIMPLE, pad_edge=False)
    for row in report["stages"]:
        loss = f"{row['loss_first']:.2f} -> {row['loss_last']:.2f}"
        speed, text = f"{row['tokens_per_second']:,.0f}", f"{row['held_out_text_loss']:.3f}"
        table.add_row(row["stage"], str(row["steps"]), loss, speed, f"{row['seconds']:.0f}", text)
    console = Console()
    console.print(table)
    console.print(f"{report['held_out_images']} held-out digits: {report['accuracy']:.1%} right")
    for mode, wanted in (("think", "with the control token: {} think"), ("direct", "without it: {} answer at once")):
        found = report["problems"][mode]
        obeyed = wanted.format(f"{found['obeyed']:.0%}")
        console.print(f"{found['count']} held-out problems {obeyed}, {found['right']:.0%} right")
    found = ", ".join(f"{share:.0%} of those in {length} tokens" for length, share in report["needles_found"].items())
    console.print(f"numbers found in documents: {found}")
    example = report["example"]
    console.print(f"held-out digit {example['expected']}, not thinking: {example['non_thinking']['answer']}")
    thinking = example["thinking"]
    thought = "" if thinking["thought"] is None else f"<think>{thinking['thought']}</think>"
    console.print(f"held-out digit {example['expected']}, thinking: {thought}{thinking['answer']}", markup=False)
    console.print(f"{report['seconds']:.0f} s in all; written to {path}")
