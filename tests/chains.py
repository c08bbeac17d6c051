"""A small pipeline for tests of pipelines: a teacher, its pruning, and two stages from that."""

from pathlib import Path

CHAIN = """
name: chain
stages:
  teacher: {recipe: tiny/text_teacher}
  cut: {prune: teacher, recipe: tiny/align_projector}
  align: {recipe: tiny/align_projector, overrides: ["init_from=${run:cut}"]}
  joint: {recipe: tiny/align_projector, overrides: ["init_from=${run:align}", "train.freeze=[]"]}
"""


def write_chain(folder: Path) -> str:
    """The file of the pipeline, written into ``folder``."""
    (folder / "chain.yaml").write_text(CHAIN)
    return str(folder / "chain.yaml")


def settings(corpus: Path, folder: Path, steps: int, save_every: int) -> list[str]:
    """Overrides for all stages: so short that they take seconds, their runs in ``folder``."""
    return [
        *(f"data.root={corpus}", f"data.index={corpus.parent / 'index'}", f"run_dir={folder}"),
        *("train.global_batch_size=2", "train.micro_batch_size=1", "optim.warmup_steps=1"),
        *(f"train.steps={steps}", f"train.save_every={save_every}"),
    ]
