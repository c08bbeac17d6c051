"""What a reward model's recipe must be: answers in pairs, whose scores the last rows of whole documents give."""

from typing import Iterator


def reward_model_problems(recipe) -> Iterator[str]:
    """What is wrong with the keys of a recipe whose ``objective`` is reward_model."""
    train, parallel, data = recipe.train, recipe.parallel, recipe.data
    if train.micro_batch_size != 1:
        yield f"train.micro_batch_size is {train.micro_batch_size}; with objective reward_model it must be 1"
    if parallel.pipeline > 1 or parallel.context > 1:
        key = "pipeline" if parallel.pipeline > 1 else "context"
        yield (
            f"parallel.{key} is {getattr(parallel, key)}; scores are computed by tensor and data parallelism, set it "
            "to 1 and raise parallel.tensor"
        )
    if train.cuda_graphs:
        yield "train.cuda_graphs is true; steps of a reward model have no fixed shape, set it to false"
    if data.max_documents < 2:
        yield f"data.max_documents is {data.max_documents}; it must be 2 or more, the answers of a pair lie in one pack"
    if data.oversize.value == "truncate":
        yield "data.oversize is truncate; half an answer is another answer, set it to drop or error"
    if recipe.distill.teacher is not None or recipe.distill.logits is not None:
        yield "distill is set; with objective reward_model set distill.teacher=null and distill.logits=null"
    if recipe.environments:
        yield "environments is set, but objective is reward_model; set objective=grpo, or leave environments out"
