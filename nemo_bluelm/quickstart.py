"""Every stage, tiny, on this machine: make a corpus, train on it, measure what was learnt on what was held out."""

import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table

from nemo_bluelm.atomic import write_atomically
from nemo_bluelm.config.grpo import Objective
from nemo_bluelm.config.pipeline import Stage, load_pipeline, quoted
from nemo_bluelm.errors import UserError
from nemo_bluelm.report.run_page import write_report
from nemo_bluelm.report.runs import find_runs
from nemo_bluelm.runtime.run_dir import read_metrics, resolve_checkpoint
from nemo_bluelm.train.chain import load_stage, run_pipeline

PIPELINE = "tiny/pipeline"
MICRO_BATCH = 2  # packs, a divisor of the batch of every stage that takes more than one: fewer and larger operations
REPORT_FILE, PAGE_FILE = "report.json", "report.html"
MEASURES = {Objective.next_token: "loss", Objective.reward_model: "accuracy", Objective.grpo: "reward/mean"}
PARTS = 4  # of a stage; its reported losses are the means of the first and the last, as few steps tell their samples
MAX_NEW_TOKENS = 64
QUESTIONS = 100  # of the held-out problems, asked in both modes
BUDGETS = (0, 8, 16, 32, None)  # tokens of a thought
EVALUATED = "sft"  # stage that answers in every mode; reinforcement learning goes on with one of them
LOOKS_FOR_NEEDLES = ("decay", "long_context", "sft")  # stages: the last one without YaRN, those with it
NEEDLE_LENGTHS, NEEDLE_DEPTHS, NEEDLES = (512, 2560), (0.1, 0.5, 0.9), 16  # tokens; documents of each length and depth


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
    ours = [f"{key}={quoted(folder)}" for key, folder in folders.items()]
    for stage in load_pipeline(PIPELINE, ours).stages:
        if stage.teacher is None and load_stage(stage).objective is Objective.next_token:
            ours.append(f"{stage.name}.train.micro_batch_size={MICRO_BATCH}")
    pipeline = load_pipeline(PIPELINE, [*ours, *overrides])
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # steps are too small for more, which wait for each other
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
    evaluation = _evaluate(pipeline.stage(EVALUATED).folder, corpus)
    for row in rows:
        if row["measure"] != "accuracy":  # a reward model writes nothing
            row |= _on_texts(pipeline.stage(row["stage"]).folder, _texts(corpus), row["stage"] in LOOKS_FOR_NEEDLES)
    evaluation["sampled"] = _sampled(pipeline.stages[-1].folder)
    console.print("exporting to Hugging Face, and comparing")
    evaluation["export"] = _exported(pipeline.stages[-1].folder, out / "hf")
    report = {"stages": rows, **evaluation, "seconds": round(time.perf_counter() - started, 1)}
    write_atomically(out / REPORT_FILE, (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())
    _print(report, out / REPORT_FILE)
    write_report(find_runs([out]), out / PAGE_FILE)
    console.print(f"what happened in each stage: {out / PAGE_FILE}")
    return 0


def _stage_row(stage: Stage) -> dict:
    """What a finished run says of itself; the first step, which warms caches, is left out of the speed."""
    steps, recipe = read_metrics(stage.folder), load_stage(stage)
    values = [step[MEASURES[recipe.objective]] for step in steps]
    some = -(-len(values) // PARTS)
    seconds = sum(step["seconds"] for step in steps)
    timed = steps[1:] or steps
    return {
        "stage": stage.name,
        "steps": recipe.train.steps,
        "measure": MEASURES[recipe.objective],
        "first": sum(values[:some]) / some,
        "last": sum(values[-some:]) / some,
        "tokens_per_second": sum(s["tokens"] for s in timed) / sum(s["seconds"] for s in timed),
        "seconds": round(seconds, 1),
    }


def _evaluate(run_dir: Path, corpus: Path) -> dict:
    """What the last stage's model can do.

    Exact-match accuracy on digits without thinking, one reply in each mode to the first of them, and replies to
    held-out problems in both modes.
    """
    from nemo_bluelm.evaluate.budgets import accuracy_by_budget
    from nemo_bluelm.evaluate.control import as_rows, control_obedience
    from nemo_bluelm.generate.generator import open_generator
    from nemo_bluelm.generate.request import Prompt, Sampling

    questions = [(record.messages, images) for record, images in _records(corpus / "digits-test.tar")]
    problems = [(record, images) for record, images in _records(corpus / "reasoning-test.tar") if not images]
    prompts = [Prompt(messages[:-1], images) for messages, images in questions]
    expected = [messages[-1]["content"] for messages, _ in questions]
    with open_generator(resolve_checkpoint(str(run_dir), "run_dir")) as generator:
        free = Sampling(MAX_NEW_TOKENS, enforce=False)
        replies = generator.generate(prompts, free)
        thinking = generator.generate([Prompt(prompts[0].messages, prompts[0].images, think=True)], free)[0]
        modes = as_rows(control_obedience(generator, problems[:QUESTIONS]))
        budgets = [asdict(row) for row in accuracy_by_budget(generator, problems[:QUESTIONS], BUDGETS)]
    right = sum(reply.thought is None and reply.answer == answer for reply, answer in zip(replies, expected))
    return {
        "accuracy": right / len(expected),
        "held_out_images": len(expected),
        "problems": modes,
        "budgets": budgets,
        "example": {
            "expected": expected[0],
            "non_thinking": _said(replies[0]),
            "thinking": _said(thinking),
        },
    }


def _sampled(run_dir: Path) -> dict:
    """What reinforcement learning measured of replies to held-out prompts, before it and after."""
    from nemo_bluelm.rl.validation import FILE

    rows = [json.loads(line) for line in (run_dir / FILE).read_text().splitlines()]
    return {"before": rows[0], "after": rows[-1]}


def _exported(run_dir: Path, folder: Path) -> dict:
    """The verdict on an export of the run, which transformers has loaded."""
    from nemo_bluelm.convert.exporting import export_hf
    from nemo_bluelm.convert.verify import verdict, verify

    checkpoint = resolve_checkpoint(str(run_dir), "run_dir")
    if folder.exists():  # of an earlier call
        shutil.rmtree(folder)
    export_hf(checkpoint, folder)
    return verdict(folder, checkpoint, list(verify(folder, checkpoint)))


def _said(reply) -> dict:
    return {name: getattr(reply, name) for name in ("thought", "answer", "finished")}


def _on_texts(run_dir: Path, texts: list[str], needles: bool) -> dict:
    """After a stage: nats per token of held-out texts and, if asked for, the numbers found among their sentences.

    Documents with numbers are as long as a text before the long-context stage, and five times as long.
    """
    from nemo_bluelm.evaluate.needle import found_by_length, needle_retrieval
    from nemo_bluelm.evaluate.text_loss import text_loss
    from nemo_bluelm.generate.generator import open_generator

    with open_generator(resolve_checkpoint(str(run_dir), "run_dir")) as generator:
        row = {"held_out_text_loss": text_loss(generator, texts, length=NEEDLE_LENGTHS[0])}
        if needles:
            cells = needle_retrieval(generator, texts, NEEDLE_LENGTHS, NEEDLE_DEPTHS, NEEDLES)
            row["needles_found"] = {str(length): found for length, found in found_by_length(cells).items()}
    return row


def _records(shard: Path) -> list[Any]:
    from nemo_bluelm.data.records import read_records

    return [(record, images) for _, record, images in read_records(shard)]


def _texts(corpus: Path) -> list[str]:
    """The held-out texts."""
    return [record.text for record, _ in _records(corpus / "text-test.tar")]


def _print(report: dict, path: Path) -> None:
    columns = ("stage", "steps", "loss", "tokens/s", "seconds", "text loss")
    tight = (0, 1, 0, 0)  # it is to fit 80 columns
    table = Table(*(Column(name, no_wrap=True) for name in columns), box=box.SIMPLE, pad_edge=False, padding=tight)
    for row in report["stages"]:
        change = f"{row['first']:.2f} -> {row['last']:.2f}"
        change += "" if row["measure"] == "loss" else f" {row['measure'].partition('/')[0]}"
        speed = f"{row['tokens_per_second']:,.0f}"
        text = f"{row['held_out_text_loss']:.3f}" if "held_out_text_loss" in row else ""
        table.add_row(row["stage"], str(row["steps"]), change, speed, f"{row['seconds']:.0f}", text)
    console = Console()
    console.print(table)
    console.print(f"{report['held_out_images']} held-out digits: {report['accuracy']:.1%} right")
    for mode, wanted in (("think", "with the control token: {} think"), ("direct", "without it: {} answer at once")):
        found = report["problems"][mode]
        obeyed = wanted.format(f"{found['obeyed']:.0%}")
        console.print(f"{found['count']} held-out problems {obeyed}, {found['right']:.0%} right")
    budgets = Table("thinking budget", "right", "tokens thought", box=box.SIMPLE, pad_edge=False)
    for row in report["budgets"]:
        limit = "none" if row["budget"] is None else str(row["budget"])
        name = limit if row["think"] else "not thinking"
        budgets.add_row(name, f"{row['accuracy']:.0%}", f"{row['thinking_tokens']:.1f}")
    console.print(budgets)
    for row in report["stages"]:
        if "needles_found" in row:
            shares = [f"{share:.0%} of those in {length} tokens" for length, share in row["needles_found"].items()]
            console.print(f"numbers found in documents after {row['stage']}: {', '.join(shares)}")
    before, after = (report["sampled"][when] for when in ("before", "after"))
    for task in ("digits", "problems"):
        shares = " -> ".join(f"{row[f'val/{task}/accuracy']:.0%}" for row in (before, after))
        console.print(
            f"replies to held-out {task}, sampled as in reinforcement learning, right before and after: {shares}"
        )
    example = report["example"]
    console.print(f"held-out digit {example['expected']}, not thinking: {example['non_thinking']['answer']}")
    thinking = example["thinking"]
    thought = "" if thinking["thought"] is None else f"<think>{thinking['thought']}</think>"
    console.print(f"held-out digit {example['expected']}, thinking: {thought}{thinking['answer']}", markup=False)
    checks = report["export"]["checks"]
    agree = sum(check["passed"] for check in checks)
    console.print(
        f"{path.parent / 'hf'}, opened by transformers: {agree} of {len(checks)} comparisons with the run agree"
    )
    console.print(f"{report['seconds']:.0f} s in all; written to {path}")
