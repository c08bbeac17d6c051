"""From a curation recipe to the stages that run one after another, each a datatrove pipeline of parallel tasks."""

import posixpath
from dataclasses import dataclass

from datatrove.pipeline.base import PipelineStep

from nemo_bluelm.data.curate.documents import Dropped, HandOver, TakeOver, named
from nemo_bluelm.data.curate.read import LookAtImages, ReadRecords
from nemo_bluelm.data.curate.report import WriteReport
from nemo_bluelm.data.curate.schema import CurationRecipe
from nemo_bluelm.data.curate.steps import Dedup
from nemo_bluelm.data.curate.write import WriteShards

LOOK, READ = "look_at_images", "read"


@dataclass
class Stage:
    """A pipeline that ``tasks`` tasks run; it starts when the stage before has ended."""

    name: str
    tasks: int
    pipeline: list[PipelineStep]
    logs: str  # folder of datatrove's logs, statistics and completions


def build_stages(recipe: CurationRecipe, shards: list[str], root: str) -> list[Stage]:
    """All stages.

    A dedup step compares records of all tasks, so the pipeline is cut there: one stage signs the records and hands
    them over, further ones match the signatures, and the next takes the records over and removes the copies.

    Args:
        shards: as ``expand`` finds them below ``root``.
    """
    return _Builder(recipe, shards, root).build()


class _Builder:
    def __init__(self, recipe: CurationRecipe, shards: list[str], root: str):
        self.recipe, self.root = recipe, root
        self.work = posixpath.join(recipe.output, "work")
        self.stages: list[Stage] = []
        self.reported: list[tuple[str, str]] = []  # (step, folder of its statistics)
        self.waiting: list[str] = []  # steps of the stage that is being built
        self.chain = [self._report(READ, ReadRecords(root, shards, self._dropped(READ)))]

    def build(self) -> list[Stage]:
        recipe = self.recipe
        wanted = frozenset().union(*(step.images for step in recipe.steps.values()))
        seen = False
        for name, step in recipe.steps.items():
            if step.images and not seen:
                look = LookAtImages(self.root, wanted, self._dropped(LOOK))
                self.chain.append(self._report(LOOK, look))
                seen = True
            if isinstance(step, Dedup):
                self._compare(name, step)
            else:
                self.chain.append(self._report(name, step.build(self._dropped(name))))
        counts = f"{self.work}/counts"
        write = WriteShards(self.root, recipe.output, counts, recipe.name, recipe.samples_per_shard)
        self._end("write", recipe.tasks, [*self.chain, write])
        done = [f"work/{name}" for name, step in recipe.steps.items() if isinstance(step, Dedup)]
        self._end("report", 1, [WriteReport(recipe, self.reported, counts, done)])
        return self.stages

    def _compare(self, name: str, step: Dedup) -> None:
        folder = f"{self.work}/{name}"
        self._end(f"{name}-sign", self.recipe.tasks, [*self.chain, HandOver(f"{folder}/records"), step.sign(folder)])
        for part, tasks, pipeline in step.match(folder):
            self._end(f"{name}-{part}", tasks, pipeline)
        remove = self._report(name, step.remove(folder, self._dropped(name)))
        self.chain = [TakeOver(f"{folder}/records"), remove]

    def _end(self, name: str, tasks: int, pipeline: list[PipelineStep]) -> None:
        logs = f"{self.work}/logs/{len(self.stages):02d}-{name}"
        self.stages.append(Stage(name, tasks, pipeline, logs))
        self.reported += [(step, logs) for step in self.waiting]
        self.waiting = []

    def _report(self, name: str, step: PipelineStep) -> PipelineStep:
        self.waiting.append(name)
        return named(step, name)

    def _dropped(self, step: str) -> Dropped | None:
        return Dropped(f"{self.recipe.output}/dropped/{step}", step) if self.recipe.keep_dropped else None
