"""Ablations: a pipeline whose last stages are variants of one another, and what is measured on each of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from nemo_bluelm import resources
from nemo_bluelm.config import translate
from nemo_bluelm.config.pipeline import Pipeline, check_keys, quoted, read_mapping, read_stages, value_of
from nemo_bluelm.errors import UserError

_KEYS = ("name", "stages", "common", "variants", "measures")
_COMMON_KEYS = ("recipe", "overrides")


@dataclass(frozen=True)
class Ablation:
    """
    Attributes:
        path: what the user called it, for messages.
        out: folder of ``runs/`` and of what is found.
        chain: the shared stages, then the variants.
        variants: what tables and plots call each variant, by the name of its stage.
        measures: options by the name of a measure of ``nemo_bluelm.evaluate.measures``, not checked yet.
    """

    path: str
    out: Path
    chain: Pipeline
    variants: dict[str, str]
    measures: dict[str, Any]


def load_ablation(path: str, overrides: list[str], out: Optional[Path] = None) -> Ablation:
    """Read an ablation file: a pipeline's ``name`` and ``stages``, ``common``, ``variants`` and ``measures``.

    A variant is a stage that is run after all ``stages``, and may have a ``label``. ``common`` is the recipe and the
    overrides that variants share; their own overrides come after these. ``measures`` is a mapping from the name of a
    measure to its options.

    Args:
        path: the file, or the name of a packaged ablation (``text_ratio``).
        overrides: as ``load_pipeline`` takes them, variants are stages like others; ``MEASURE.option=value`` is for a
            measure of the file.
        out: the folder (outputs/ablations/NAME).

    Raises:
        UserError: what is wrong with the file or an override, in one line.
    """
    file = _find(path)
    content = read_mapping(file, path)
    check_keys(content, _KEYS, path, "an ablation")
    measures = content.get("measures")
    if not isinstance(measures, dict) or not measures:
        raise UserError(f"{path}: measures must be a mapping of one measure or more, such as 'text_loss: {{}}'")
    measures, overrides = _with_options(measures, overrides)
    content, labels = _as_stages(content, path)
    out = out or Path("outputs/ablations") / str(content.get("name"))
    lists = ("stages", "variants") if content.get("stages") else ("variants",)
    runs = [f"run_dir={quoted(out / 'runs')}", *overrides]
    chain = read_stages(content, lists, path, file.parent, runs)
    variants = {name: labels.get(name, name) for name in content["variants"]}
    for name, label in variants.items():
        _check_variant(name, label, chain, list(variants), path)
    return Ablation(path, out, chain, variants, measures)


def _find(name: str) -> Path:
    if not name.endswith(".yaml") and "/" not in name:
        name = f"ablations/{name}"
    return resources.find_recipe(name, "ablation")


def _as_stages(content: dict[str, Any], path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content with variants that are complete stages, as a pipeline has them, and the labels by their names."""
    variants, common = content.get("variants"), content.get("common", {})
    check_keys(common, _COMMON_KEYS, f"{path}: common", "common")
    shared = common.get("overrides", [])
    if not isinstance(shared, list):
        raise UserError(f"{path}: common: overrides must be a list of texts such as - optim.lr=1e-4, it is {shared}")
    if not isinstance(variants, dict):
        return content, {}
    labels, stages = {}, {}
    for name, entry in variants.items():
        if isinstance(entry, dict):  # what it must be; reading the stages says so
            own = entry.get("overrides", [])
            labels[name] = entry.get("label", name)
            entry = common | {key: value for key, value in entry.items() if key != "label"}
            entry["overrides"] = [*shared, *own] if isinstance(own, list) else own
        stages[name] = entry
    return {**content, "variants": stages}, labels


def _with_options(measures: dict[str, Any], overrides: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The measures with the options that overrides set, and the overrides that are for runs."""
    measures, rest = dict(measures), []
    for override in overrides:
        key = translate.override_key(override)
        name, _, option = key.partition(".")
        if key == "run_dir":
            raise UserError(f"{override}: an ablation's runs are in its folder, which --out DIR names")
        if option and name in measures:
            given = measures[name]
            if given is None or isinstance(given, dict):  # else the measure says that it can't be
                measures[name] = {**(given or {}), option: value_of(override)}
        else:
            rest.append(override)
    return measures, rest


def _check_variant(name: str, label: Any, chain: Pipeline, variants: list[str], path: str) -> None:
    where = f"{path}: variant {name}"
    if not isinstance(label, str) or not label.strip() or "|" in label:
        raise UserError(f"{where}: label is {label!r}; it must be a short text without |")
    stage = chain.stage(name)
    if stage.teacher is not None:
        raise UserError(f"{where} is a pruning; put it into stages, and let the variant train what it makes")
    if other := next((other for other in stage.after if other in variants), None):
        raise UserError(f"{where} refers to variant {other}; what a variant builds on belongs into stages")
