"""Runs an ablation: trains its variants, measures each, writes a table and a plot."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Optional

from rich.console import Console

from nemo_bluelm.atomic import write_atomically
from nemo_bluelm.config.ablation import Ablation
from nemo_bluelm.config.schema import Recipe
from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate.learning import tokens_seen
from nemo_bluelm.evaluate.measures import TOKENS, Measure, Measured, Number, Run, make_measures
from nemo_bluelm.report.ablation_table import console_table, markdown
from nemo_bluelm.runtime.run_dir import resolve_checkpoint
from nemo_bluelm.train.chain import load_stage, run_pipeline

TABLE, TABLE_JSON, PLOT = "table.md", "table.json", "plot.png"
QUICKSTART_CORPUS = Path("outputs/quickstart/corpus")  # what the tiny recipes read

Found = dict[str, dict[str, Measured]]  # by the variant's and the measure's name


def run_ablation(ablation: Ablation, nproc: int) -> int:
    """Train, measure, print a table, write ``table.md``, ``table.json`` and ``plot.png``.

    What is already there is kept: called again it goes on with the run or the measure that was cut off. The corpus that
    the tiny recipes read is made where it is missing.

    Args:
        nproc: processes of each training run.

    Returns:
        Exit code: that of the first run that failed or was stopped, else 0.

    Raises:
        UserError: a mistake in the file, the overrides, a recipe or the data, told before anything is trained; the
            folder can't be written.
    """
    console = Console(stderr=True)
    measures = make_measures(ablation.measures, ablation.path)
    recipes = {stage.name: load_stage(stage) for stage in ablation.chain.stages}
    _make_missing_corpus(recipes, console)
    runs = _runs(ablation, recipes)
    for measure in measures:
        for name, run in runs.items():
            try:
                measure.check(run)
            except UserError as error:
                raise UserError(f"{ablation.path}: measure {measure.name} of {name}: {error}") from error
    if code := run_pipeline(ablation.chain, nproc):
        return code

    found: Found = {}
    for name, run in runs.items():
        file = ablation.out / "measures" / f"{name}.json"
        found[name] = {}
        for measure in measures:
            console.print(f"{ablation.chain.name}  {name}: {measure.name}", highlight=False)
            found[name][measure.name] = measured(measure, run, file)
        seen = Number("tokens in training", tokens_seen(run.folder)[-1], TOKENS)
        found[name] = {"training": Measured((seen,)), **found[name]}
    _write(ablation, measures, found)
    return 0


def _runs(ablation: Ablation, recipes: dict[str, Recipe]) -> dict[str, Run]:
    folders = {stage.name: stage.folder for stage in ablation.chain.stages if stage.teacher is None}
    runs = {}
    for name in ablation.variants:
        recipe = recipes[name]
        runs[name] = Run(recipe, folders[name], Path(recipe.init_from) if recipe.init_from else None, folders)
    return runs


def _make_missing_corpus(recipes: dict[str, Recipe], console: Console) -> None:
    wanted = any(Path(recipe.data.root) == QUICKSTART_CORPUS for recipe in recipes.values())
    if wanted and not QUICKSTART_CORPUS.exists():
        from nemo_bluelm.data.corpus import make_corpus

        console.print(f"making the corpus in {QUICKSTART_CORPUS}")
        make_corpus(QUICKSTART_CORPUS)


def measured(measure: Measure, run: Run, file: Path) -> Measured:
    """What the file has of this measure, with these options and of these checkpoints; else measured and added to it."""
    kept = json.loads(file.read_text()) if file.is_file() else {}
    checkpoints = [resolve_checkpoint(str(folder), "run_dir") for folder in measure.reads(run)]
    made_of = {str(checkpoint): checkpoint.stat().st_mtime_ns for checkpoint in checkpoints}
    basis = {"options": asdict(measure), "data": run.recipe.data.root, "made_of": made_of}
    entry = kept.get(measure.name)
    if entry is None or entry["basis"] != basis:
        entry = {"basis": basis, **asdict(measure.measure(run))}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, _json({**kept, measure.name: entry}))
        except OSError as error:
            raise _unwritable(file.parent, error) from error
        entry = json.loads(_json(entry))
    numbers, drawn = (tuple(Number(**number) for number in entry[key]) for key in ("numbers", "drawn"))
    return Measured(numbers, drawn, tuple(map(tuple, entry["curve"])))


def _write(ablation: Ablation, measures: list[Measure], found: Found) -> None:
    from nemo_bluelm.report.ablation_plot import plot

    rows = _rows(found)
    labels, out = list(ablation.variants.values()), ablation.out
    variants = {
        name: {
            "label": label,
            "recipe": ablation.chain.stage(name).recipe,
            "overrides": ablation.chain.stage(name).overrides,
            "measures": {measure: asdict(of) for measure, of in found[name].items()},
        }
        for name, label in ablation.variants.items()
    }
    try:
        write_atomically(out / TABLE_JSON, _json({"ablation": ablation.chain.name, "variants": variants}))
        write_atomically(out / TABLE, markdown(labels, rows).encode())
        write_atomically(out / PLOT, plot(labels, measures, list(found.values())))
    except OSError as error:
        raise _unwritable(out, error) from error
    console = Console()
    console.print(console_table(labels, rows))
    console.print(f"written to {out / TABLE}, {out / TABLE_JSON} and {out / PLOT}", highlight=False)


def _rows(found: Found) -> list[tuple[str, str, list[Optional[float]]]]:
    """The table's rows: name, unit, and a value for each variant. A number that a variant lacks is None."""
    units = {n.name: n.unit for of in found.values() for measured in of.values() for n in measured.numbers}
    values = [{n.name: n.value for measured in of.values() for n in measured.numbers} for of in found.values()]
    return [(name, unit, [of.get(name) for of in values]) for name, unit in units.items()]


def _json(content: dict) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"--out {folder} can't be written: {error.strerror}; choose another folder")
