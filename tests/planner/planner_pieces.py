"""Recipes of the full model for the planner's tests."""

from dataclasses import replace

from planner_measured import TextStep

from nemo_bluelm.config.optim import OptimConfig
from nemo_bluelm.config.schema import DataConfig, ModelConfig, Part, Recipe, SourceConfig, TrainConfig
from nemo_bluelm.planner.layouts import with_settings

TEXT_ONLY = [Part.vision, Part.projector]  # trained parts without their ViT


def full_recipe(length: int = 4096, batch: int = 64, freeze=(), model: ModelConfig | None = None, **settings) -> Recipe:
    """BF16, one GPU; ``settings`` are dotted keys with ``__`` for the dot: ``parallel__tensor=2``."""
    model = model or ModelConfig()
    model.language.yarn.factor = max(1.0, length / 4096)
    recipe = Recipe(
        name="probe",
        model=model,
        data=DataConfig(root="corpus", sequence_length=length, sources={"text": SourceConfig(shards=["text"])}),
        optim=OptimConfig(lr=1e-4),
        train=TrainConfig(steps=1000, global_batch_size=batch, freeze=list(freeze)),
    )
    return with_settings(recipe, {key.replace("__", "."): value for key, value in settings.items()})


def in_fp8(recipe: Recipe, kind) -> Recipe:
    precision = replace(recipe.precision, fp8=replace(recipe.precision.fp8, recipe=kind))
    return replace(recipe, precision=precision)


def measured_recipe(row: TextStep) -> Recipe:
    """What ``row`` was measured with."""
    settings = dict(train__micro_batch_size=row.packs, train__cuda_graphs=row.graphs)
    packs = 65536 // row.length
    return in_fp8(full_recipe(row.length, packs, TEXT_ONLY, **settings, parallel__distributed_optimizer=True), row.fp8)
