"""Exact and MinHash dedup by datatrove: signatures, matching over all tasks, removal by document number."""

import hashlib
from typing import TYPE_CHECKING

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.dedup import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
    UrlDedupConfig,
    UrlDedupFilter,
    UrlDedupSignature,
    UrlFindDedups,
)
from datatrove.utils.hashing import HashConfig

from nemo_bluelm.data.curate.documents import named
from nemo_bluelm.data.curate.text_filters import WORDS

if TYPE_CHECKING:
    from nemo_bluelm.data.curate import steps

# datatrove gives xxhash text, which versions of it from 4 on refuse.
_HASH = HashConfig(hash_fc="sha1")
_BY_KEY = UrlDedupConfig(hash_config=_HASH)


class _SignKey(UrlDedupSignature):
    """datatrove's dedup by URL, with another key in the URL's place."""

    name = "sign"

    def __init__(self, key: str, folder: str, tasks: int):
        super().__init__(folder, tasks, _BY_KEY)
        self.key = key
        self.priority = 1

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        self.priority = max(1, 0xFFFF - rank)  # the copy in the first shard stays
        super().run(data, rank, world_size)

    def get_hashes(self, doc: Document, doc_idx: int) -> list[tuple[int, int, int]]:
        return [(self.hash_fc(key_of(doc, self.key)), self.priority, doc_idx)]


def key_of(doc: Document, kind: str) -> str:
    """What two copies have in common: ``text``, ``images`` or ``pair``. A record without images copies none."""
    images = [image["digest"] for image in doc.metadata.get("seen", ())]
    if kind == "images" and not images:
        return doc.id
    # Numbers differ between two questions or two tables, so unlike for near copies they count.
    text = hashlib.sha256(" ".join(doc.text.casefold().split()).encode()).hexdigest() if kind != "images" else ""
    return ":".join([text, *(images if kind != "text" else ())])


def sign_key(key: str, folder: str, tasks: int):
    return _SignKey(key, f"{folder}/signatures", tasks)


def match_keys(folder: str):
    return named(UrlFindDedups(f"{folder}/signatures", f"{folder}/copies", config=_BY_KEY), "match")


def remove_keys(folder: str, dropped):
    return UrlDedupFilter(f"{folder}/copies", _BY_KEY, dropped)


def _config(step: "steps.MinhashDedup") -> MinhashConfig:
    return MinhashConfig(
        n_grams=step.ngrams, num_buckets=step.buckets, hashes_per_bucket=step.hashes, hash_config=_HASH
    )


def sign_minhash(step: "steps.MinhashDedup", folder: str):
    return named(MinhashDedupSignature(f"{folder}/signatures", _config(step), language=WORDS), "sign")


def match_minhash(step: "steps.MinhashDedup", folder: str) -> list[tuple[str, int, list]]:
    buckets = MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets", config=_config(step))
    cluster = MinhashDedupCluster(f"{folder}/buckets", f"{folder}/copies", config=_config(step))
    return [("match", step.buckets, [named(buckets, "match")]), ("cluster", 1, [named(cluster, "cluster")])]


def remove_listed(folder: str, dropped):
    """Removes the numbers in ``copies/NNNNNN.remove``, ascending little-endian uint32."""
    return MinhashDedupFilter(f"{folder}/copies", exclusion_writer=dropped)
