"""Checks of the distill keys."""

from collections.abc import Iterator
from dataclasses import fields

from nemo_bluelm.config.schema import DistillConfig, Recipe


def distill_problems(recipe: Recipe) -> Iterator[str]:
    """What is wrong with how a recipe distills, in one line each."""
    distill, pipeline = recipe.distill, recipe.parallel.pipeline
    for key in ("teacher", "logits"):
        if getattr(distill, key) is not None and not getattr(distill, key).strip():
            yield f"distill.{key} is empty; it must be a folder, or null"
    if distill.teacher is None and distill.logits is None:
        for entry in fields(DistillConfig):
            value = getattr(distill, entry.name)
            if value != entry.default:
                yield (
                    f"distill.{entry.name} is {value} without a teacher to learn from; set distill.teacher or "
                    f"distill.logits, or leave distill.{entry.name} out"
                )
        return
    if distill.teacher is not None and distill.logits is not None:
        yield (
            f"distill.teacher is {distill.teacher} and distill.logits is {distill.logits}, which are two ways to the "
            "same; set one of them to null"
        )
    if not distill.split_teacher and distill.teacher is None:
        yield "distill.split_teacher is false without distill.teacher; leave it out"
    for key in ("weight", "weight_end"):
        value = getattr(distill, key)
        if value is not None and not 0 <= value <= 1:
            yield f"distill.{key} is {value}; it must be from 0 to 1"
    for key in ("temperature", "temperature_end"):
        value = getattr(distill, key)
        if value is not None and not 0 < value < float("inf"):
            yield f"distill.{key} is {value}; it must be greater than 0 and finite"
    rows = recipe.model.language.vocab_size
    for key in ("top_k", "top_k_end"):
        value = getattr(distill, key)
        if value is not None and not 1 <= value <= rows:
            yield f"distill.{key} is {value}; it must be from 1 to model.language.vocab_size {rows}, or null"
    if distill.top_k is None and distill.top_k_end is not None:
        yield f"distill.top_k_end is {distill.top_k_end} without distill.top_k, from which it is reached; set both"
    if pipeline > 1:
        yield (
            f"parallel.pipeline is {pipeline} with distill; teacher and student meet on one pipeline rank, set "
            "parallel.pipeline=1"
        )
