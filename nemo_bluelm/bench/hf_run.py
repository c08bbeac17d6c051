"""The transformers peer in a process of its own, and the comparison with ours."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

from nemo_bluelm.bench.case import Start, write_case
from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.config.schema import Recipe


def measure(
    recipe: Recipe,
    steps: int,
    warmup: int,
    start: Start,
    micro_batches: list[int] | None = None,
    compiled: bool = True,
    profile: Path | None = None,
) -> list[dict]:
    """A row for every form and micro-batch size of the peer.

    Args:
        start: starts the process.
        micro_batches, compiled, profile: as ``hf_train.measure_peers``.

    Raises:
        UserError: the recipe's data can't be used.
    """
    with tempfile.TemporaryDirectory(prefix="nemo-bluelm-bench-") as folder:
        result = Path(folder) / "rows.jsonl"
        result.touch()
        case = write_case(replace(recipe, init_from=None, init_vision_from=None), Path(folder))
        arguments = ["bench", "peers", str(case), "--steps", str(steps), "--warmup", str(warmup)]
        arguments += ["--worker", str(result), "--compile" if compiled else "--no-compile"]
        arguments += ["--micro-batches", ",".join(map(str, micro_batches))] if micro_batches else []
        arguments += ["--profile", str(Path(profile).absolute())] if profile else []
        code = start(arguments)
        rows = [json.loads(line) for line in result.read_text().splitlines()]
        if code:
            rows.append({"name": "transformers", "error": f"the process ended with exit code {code}"})
        return rows


def measure_here(
    path: str,
    steps: int,
    warmup: int,
    micro_batches: list[int] | None,
    compiled: bool,
    result: Path,
    profile: Path | None,
) -> int:
    """What :func:`measure` runs."""
    from nemo_bluelm.runtime.environment import quiet

    quiet()
    from nemo_bluelm.bench.hf_train import append_line, measure_peers

    measure_peers(load_recipe(path, []), steps, warmup, micro_batches, compiled, append_line(result), profile)
    return 0


def compare(ours: dict | None, rows: list[dict]) -> dict:
    """Ours, the peer's rows, the name of its ``best`` and our tokens a second over that one's as ``ratio``.

    There is no ratio, but a ``note``, where the two models differ in their number of weights.
    """
    measured = [row for row in rows if "error" not in row]
    best = max(measured, key=lambda row: row["tokens_per_second"], default=None)
    ratio = note = None
    if best and ours and "error" not in ours:
        weights, language = sum(ours["parameters"].values()), ours["parameters"]["language"]
        if best["parameters"] in (weights, language):
            ratio = round(ours["tokens_per_second"] / best["tokens_per_second"], 4)
        else:
            note = f"the peer has {best['parameters']:,} weights and ours {weights:,}; they can't be compared"
    return {"ours": ours, "peers": rows, "best": best and best["name"], "ratio": ratio, "note": note}
