"""An index of made-up lengths, for tests of what is planned from it."""

from types import SimpleNamespace

import numpy as np

from nemo_bluelm.data.groups import Member
from nemo_bluelm.data.index import Sample


class Shard:
    """Looks like a ShardIndex."""

    def __init__(self, name, tokens, tiles=None, least=None, text=None, tags=None, rejected=0):
        self.name, self.rejected, self.torn, self.digest = name, rejected, None, f"digest of {name}"
        self.tokens = np.asarray(tokens, np.int32)
        self.tiles = np.zeros_like(self.tokens) if tiles is None else np.asarray(tiles, np.int32)
        self.least = np.ones_like(self.tokens) if least is None else np.asarray(least, np.int32)
        self.text = self.tiles == 0 if text is None else np.asarray(text, bool)
        self._tags = tags or {}
        self.tags = frozenset(self._tags)

    def __len__(self):
        return len(self.tokens)

    def rows_with_tag(self, tag):
        return np.asarray(self._tags.get(tag, []), np.int64)

    def sample(self, row):
        tokens, tiles, least = int(self.tokens[row]), int(self.tiles[row]), int(self.least[row])
        text = bool(self.text[row])
        return Sample(self.name, f"s{row}", row, Member(row, 1), tokens, tiles, least, text, (), (), b"")


class Index(dict):
    """Looks like an Index."""

    def __init__(self, *shards, excluded=None):
        super().__init__({shard.name: shard for shard in shards})
        self.excluded = {name: np.asarray(rows) for name, rows in (excluded or {}).items()}
        self.settings = {"geometry": "made up"}
        self.ledger = SimpleNamespace(append=lambda entry: None)

    def complaint(self, shard):
        return f"{shard}: sample 'k': broken" if self[shard].rejected else None
