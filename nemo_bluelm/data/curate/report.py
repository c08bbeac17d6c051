"""The report: records in and out of each step with reasons, tags, and the factors for key data."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable

import yaml
from datatrove.data import DocumentsPipeline
from datatrove.io import DataFolder, get_datafolder
from datatrove.pipeline.base import PipelineStep

from nemo_bluelm.data.curate import resample
from nemo_bluelm.data.curate.schema import CurationRecipe


class WriteReport(PipelineStep):
    """Writes report.json, report.txt and, with wanted shares, resample.yaml; removes the folders ``done``."""

    type = "💽 - WRITER"
    name = "report"

    def __init__(self, recipe: CurationRecipe, reported: list[tuple[str, str]], counts: str, done: list[str]):
        super().__init__()
        self.output, self.counts = get_datafolder(recipe.output), get_datafolder(counts)
        self.source = recipe.resample.source or recipe.name
        self.shares, self.unit = dict(recipe.resample.shares), recipe.resample.unit.value
        self.shard_pattern = self.output.resolve_paths(f"{recipe.name}-*.tar")
        self.reported, self.done = reported, done

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        report = {"steps": [_count(step, get_datafolder(logs)) for step, logs in self.reported]}
        written, combinations = _written(self.counts)
        report |= written
        if self.shares:
            report["resample"] = self._resample(
                {k: found[self.unit] for k, found in combinations.items() if found[self.unit]}
            )
            snippet = {"shards": [self.shard_pattern], "resample": report["resample"]["factors"]}
            with self.output.open("resample.yaml", "w") as file:
                shares = (f"{tag} {share:.4f}" for tag, share in report["resample"]["shares"].items())
                file.write(f"# Share of {self.unit}: {', '.join(shares)}\n")
                yaml.safe_dump({"data": {"sources": {self.source: snippet}}}, file, sort_keys=False)
        with self.output.open("report.txt", "w") as file:
            file.write(table(report))
        with self.output.open("report.json", "w") as file:
            json.dump(report, file, indent=2)
        for folder in filter(self.output.exists, self.done):
            self.output.rm(folder, recursive=True)

    def _resample(self, lengths: dict[resample.Tags, int]) -> dict:
        present = {tag for tags in lengths for tag in tags}
        wanted = {tag: share for tag, share in self.shares.items() if tag in present}
        found = {tag: round(factor, 4) for tag, factor in resample.factors(lengths, wanted).items()}
        shares = {tag: round(share, 4) for tag, share in resample.shares(lengths, found).items()}
        return {"factors": found, "shares": shares, "no_records": sorted(set(self.shares) - present)}


def table(report: dict) -> str:
    """The steps as aligned columns, then the tags."""
    rows = [("step", "in", "out", "dropped", "reasons")]
    for step in report["steps"]:
        reasons = ", ".join(f"{reason} {count}" for reason, count in step["reasons"].items())
        rows.append((step["step"], f"{step['in']:,}", f"{step['out']:,}", f"{step['in'] - step['out']:,}", reasons))
    text = _columns(rows)
    if report["tags"]:
        tags = [(tag, f"{found['records']:,}", f"{found['words']:,}") for tag, found in report["tags"].items()]
        text += "\n" + _columns([("tag", "records", "words"), *tags])
    if resampled := report.get("resample"):
        tags = [(tag, f"{factor:g}", f"{resampled['shares'][tag]:.4f}") for tag, factor in resampled["factors"].items()]
        text += "\n" + _columns([("tag", "factor", "share"), *tags])
        if resampled["no_records"]:
            text += f"no record has the tag {', '.join(resampled['no_records'])}\n"
    return text + f"\n{report['records']:,} records in {len(report['shards']):,} shards\n"


def _columns(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    numeric = [all(row[at][:1].isdigit() for row in rows[1:]) for at in range(len(widths))]
    lines = [
        "  ".join(f"{cell:>{w}}" if right else f"{cell:<{w}}" for cell, w, right in zip(row, widths, numeric))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _count(step: str, logs: DataFolder) -> dict:
    """What datatrove's statistics of all tasks tell about one step."""
    found: Counter = Counter()
    for stats in _load(logs, logs.list_files("stats", glob_pattern="*.json")):
        for entry in stats:
            if entry["name"] == step:
                # datatrove writes a bare number where each document counts one.
                totals = {name: v["total"] if isinstance(v, dict) else v for name, v in entry["stats"].items()}
                found.update(totals)
    reasons = {n.removeprefix("dropped_"): c for n, c in sorted(found.items()) if n.startswith("dropped_")}
    if found["dropped"] and not reasons:
        reasons = {"duplicate": found["dropped"]}
    return {"step": step, "in": found["total"], "out": found["total"] - found["dropped"], "reasons": reasons}


def _written(counts: DataFolder) -> tuple[dict, dict[resample.Tags, Counter]]:
    """(what the shards hold, its records and words by exact set of tags)."""
    shards, combinations = [], defaultdict(Counter)
    for part in _load(counts, counts.list_files()):
        shards += part["shards"]
        for key, (records, words) in part["tags"].items():
            combinations[tuple(json.loads(key))].update(records=records, words=words)
    tags = defaultdict(Counter)
    for combination, found in combinations.items():
        for tag in combination:
            tags[tag].update(found)
    total = sum(found["records"] for found in combinations.values())
    return {"records": total, "shards": shards, "tags": dict(sorted(tags.items()))}, combinations


def _load(folder: DataFolder, names: Iterable[str]) -> Iterable:
    for name in names:
        with folder.open(name) as file:
            yield json.load(file)
