"""Filters of conversations about images, and the tagger."""

import re
from typing import TYPE_CHECKING

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter

from nemo_bluelm.data.curate import words
from nemo_bluelm.data.curate.documents import replies

if TYPE_CHECKING:
    from nemo_bluelm.data.curate import steps


class AnswerFilter(BaseFilter):
    """Plain text passes."""

    def __init__(self, step: "steps.Answer", dropped):
        super().__init__(dropped)
        self.step = step
        self.refused = re.compile("|".join(f"(?:{pattern})" for pattern in step.refuse) or r"(?!)", re.IGNORECASE)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        answers = replies(doc.metadata["record"])
        if not answers:
            return True
        answer = answers[-1].strip()
        if not answer:
            return False, "empty_answer"
        count = len(words.words(answer))
        if count < self.step.min_words:
            return False, "short_answer"
        if count > self.step.max_words:
            return False, "long_answer"
        return not self.refused.fullmatch(answer) or (False, "refused_answer")


class ImageSizeFilter(BaseFilter):
    def __init__(self, step: "steps.ImageSize", dropped):
        super().__init__(dropped)
        self.step = step

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        for width, height in (image["size"] for image in doc.metadata["seen"]):
            short, long = sorted((width, height))
            if short < self.step.min_side:
                return False, "image_too_small"
            if long > self.step.max_side:
                return False, "image_too_large"
            if long / short > self.step.max_aspect:
                return False, "image_too_thin"
        return True


class ClickInsideFilter(BaseFilter):
    def __init__(self, step: "steps.ClickInside", dropped):
        super().__init__(dropped)
        self.step = step
        self.pattern = re.compile(step.pattern)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if self.step.tag not in doc.metadata["record"].get("tags", ()):
            return True
        if not doc.metadata["seen"]:
            return False, "no_image"
        found = [match.groups() for reply in replies(doc.metadata["record"]) for match in self.pattern.finditer(reply)]
        if not found:
            return (False, "no_click") if self.step.required else True
        width, height = doc.metadata["seen"][-1]["size"]
        limits = (self.step.scale, self.step.scale) if self.step.scale else (width, height)
        return all(_inside(groups, *limits) for groups in found) or (False, "click_outside")


def _inside(groups: tuple[str | None, ...], width: float, height: float) -> bool:
    """A point lies in the image; a box does, with its first corner left of and above the second."""
    numbers = [float(group) for group in groups if group is not None]
    xs, ys = numbers[::2], numbers[1::2]
    ordered = len(numbers) == 2 or (xs[0] < xs[1] and ys[0] < ys[1])
    return ordered and all(0 <= x <= width for x in xs) and all(0 <= y <= height for y in ys)


class Tagger(PipelineStep):
    type = "🏷️ - TAGGER"
    name = "tags"

    def __init__(self, step: "steps.Tags"):
        super().__init__()
        flags = re.IGNORECASE if step.ignore_case else 0
        self.min_matches = step.min_matches
        self.rules = {tag: [re.compile(p, flags) for p in patterns] for tag, patterns in step.rules.items()}

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for document in data:
            self.stat_update("total", "forwarded")
            record = document.metadata["record"]
            tags = list(record.get("tags", ()))
            for tag, patterns in self.rules.items():
                matches = sum(1 for pattern in patterns for _ in pattern.finditer(document.text))
                if matches >= self.min_matches and tag not in tags:
                    tags.append(tag)
            if tags:
                record["tags"] = tags
            yield document
