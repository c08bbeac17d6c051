"""Groups: the members of one sample in a shard, whatever the shard's format."""

from typing import NamedTuple

from nemo_bluelm.errors import UserError

MAX_RECORD = 64 << 20  # bytes of JSON


class Member(NamedTuple):
    """Where a file lies in its shard: ``size`` bytes from ``offset``. A loose file lies at 0."""

    offset: int
    size: int


class Group(NamedTuple):
    """One sample.

    Attributes:
        key: its name; unique in a well-made shard.
        offset: byte of its first header or its line.
        members: by extension.
        bad: why it can't be a sample, if it can't.
    """

    key: str
    offset: int
    members: dict[str, Member]
    bad: str | None = None


class Torn(UserError):
    """A shard that is broken off or damaged from byte ``offset`` on; what was read before is whole."""

    def __init__(self, path: str, offset: int, reason: str):
        super().__init__(f"{path} is torn at byte {offset}: {reason}")
        self.offset, self.reason = offset, reason
