"""Checks of the optimizer's keys: schedules, parts, and what is set and would be ignored."""

from typing import Iterator

from nemo_bluelm.config.optim import DecayShape, OptimConfig, Schedule
from nemo_bluelm.config.schema import Part, Recipe

# The schedules that read a key, and its value when it isn't set.
_OF_SCHEDULE = {
    "min_lr": ((Schedule.cosine, Schedule.wsd), 0.0),
    "decay_steps": ((Schedule.wsd,), None),
    "decay_shape": ((Schedule.wsd,), DecayShape.sqrt),
    "second_lr": ((Schedule.two_stage,), None),
    "second_stage_from": ((Schedule.two_stage,), None),
}
# What a schedule can't do without: null is not a value that it can take.
_NEEDED = {
    "decay_steps": "the steps of its decay",
    "second_lr": "the second stage's learning rate",
    "second_stage_from": "the share of the steps before optim.second_lr",
}


def optim_problems(recipe: Recipe) -> Iterator[str]:
    """What is wrong across the optimizer's keys, as messages; ranges of single keys are checked elsewhere."""
    yield from _warmup(recipe)
    yield from _schedule(recipe.optim, recipe.train.steps)
    yield from _parts(recipe)


def _warmup(recipe: Recipe) -> Iterator[str]:
    optim, train = recipe.optim, recipe.train
    tokens = train.global_batch_size * recipe.data.sequence_length
    if optim.warmup_tokens is None:
        key, warmup, whole, run = "warmup_steps", optim.warmup_steps, train.steps, f"train.steps {train.steps}"
    else:
        key, warmup, whole = "warmup_tokens", optim.warmup_tokens, train.steps * tokens
        run = f"the run's {whole} tokens (train.steps * train.global_batch_size * data.sequence_length)"
        if optim.warmup_steps:
            yield (
                f"optim.warmup_tokens is {warmup} with optim.warmup_steps {optim.warmup_steps}; keep one of them: set "
                "optim.warmup_steps=0 or optim.warmup_tokens=null"
            )
    if warmup > whole:
        yield f"optim.{key} is {warmup}; it must be at most {run}"
    decay = optim.decay_steps if optim.schedule == Schedule.wsd else None
    if decay is not None and decay <= train.steps and warmup > whole - decay * whole // train.steps:
        yield (
            f"optim.{key} {warmup} and optim.decay_steps {decay} overlap in {run}; lower one of them, or raise "
            "train.steps"
        )


def _schedule(optim: OptimConfig, steps: int) -> Iterator[str]:
    examples = {
        "decay_steps": f"{max(1, steps // 10)} (a tenth of train.steps)",
        "second_lr": f"{optim.lr / 10:g}",
        "second_stage_from": "0.8",
    }
    for key, (schedules, unset) in _OF_SCHEDULE.items():
        value, wanted = getattr(optim, key), " or ".join(schedule.value for schedule in schedules)
        if value != unset and optim.schedule not in schedules:
            yield (
                f"optim.{key} is {getattr(value, 'value', value)} with optim.schedule {optim.schedule.value}, which "
                f"never uses it; set optim.schedule to {wanted}, or optim.{key}="
                f"{'null' if unset is None else getattr(unset, 'value', unset)}"
            )
        if value is None and optim.schedule in schedules:
            yield (
                f"optim.{key} is null with optim.schedule {optim.schedule.value}; set {_NEEDED[key]}, for example "
                f"optim.{key}={examples[key]}"
            )
    if optim.min_lr > optim.lr:
        yield f"optim.min_lr is {optim.min_lr}; it must be at most optim.lr {optim.lr}"
    if optim.decay_steps is not None and optim.decay_steps > steps:
        yield f"optim.decay_steps is {optim.decay_steps}; it must be at most train.steps {steps}"
    if optim.second_stage_from is not None and not 0 < optim.second_stage_from < 1:
        yield f"optim.second_stage_from is {optim.second_stage_from}; it must be greater than 0 and below 1"


def _parts(recipe: Recipe) -> Iterator[str]:
    optim, freeze = recipe.optim, recipe.train.freeze
    if set(freeze) == set(Part):
        yield "train.freeze lists vision, projector and language, so nothing is left to train; leave one out"
    if optim.vision_layer_decay > 1:
        yield (
            f"optim.vision_layer_decay is {optim.vision_layer_decay}; it must be at most 1, where all layers have one "
            "learning rate"
        )
    for part in freeze:
        for key, value in vars(getattr(optim.parts, part.value)).items():
            if value is not None:
                yield (
                    f"optim.parts.{part.value}.{key} is {value}, but train.freeze lists {part.value}; set "
                    f"optim.parts.{part.value}.{key}=null, or leave {part.value} out"
                )
    if optim.vision_layer_decay != 1 and Part.vision in freeze:
        yield (
            f"optim.vision_layer_decay is {optim.vision_layer_decay}, but train.freeze lists vision; set "
            "optim.vision_layer_decay=1, or leave vision out"
        )
