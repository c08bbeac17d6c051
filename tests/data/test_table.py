"""What can be drawn from a source: splitting, the policy for what is too large, exclusion."""

import pytest
from made_up_index import Index, Shard

from nemo_bluelm.data.table import Limits, Source, SourceTable
from nemo_bluelm.errors import UserError


def table(shard, oversize="drop", length=100, tiles=8, **index):
    return SourceTable("s", Source([shard.name]), Index(shard, **index), Limits(length, tiles, oversize))


def pieces(made):
    return [(made.locate(i)[0].key, *made.locate(i)[1:]) for i in range(len(made.tokens))]


def test_a_long_text_becomes_pieces_that_overlap_by_one_token():
    made = table(Shard("t.tar", [50, 250, 100, 101]))
    expected = [("s0", 0, 50), ("s1", 0, 100), ("s1", 99, 100), ("s1", 198, 52), ("s2", 0, 100), ("s3", 0, 100)]
    assert pieces(made) == [*expected, ("s3", 99, 2)]
    assert (made.counts.samples, made.counts.split, made.counts.dropped) == (4, 2, 0)


# Rows: fits; too long, its images and a target within the limit; too long, an image beyond it; too many tiles.
def large():
    return Shard("i.tar", [90, 300, 300, 60], [1, 1, 2, 9], least=[20, 80, 150, 50])


@pytest.mark.parametrize(
    ("oversize", "expected", "truncated", "dropped"),
    [("drop", [("s0", 0, 90)], 0, 3), ("truncate", [("s0", 0, 90), ("s1", 0, 100)], 1, 2)],
)
def test_what_is_too_large_is_dropped_or_truncated_and_counted(oversize, expected, truncated, dropped):
    made = table(large(), oversize)
    assert pieces(made) == expected
    assert (made.counts.truncated, made.counts.dropped) == (truncated, dropped)


def test_what_is_too_large_can_be_an_error():
    with pytest.raises(
        UserError, match="i.tar: sample 's1' with 300 tokens and 1 tiles is more than data.sequence_len"
    ):
        table(large(), "error")


def test_excluded_rows_are_left_out_and_told():
    whole, part = table(Shard("t.tar", [10] * 4)), table(Shard("t.tar", [10] * 4), excluded={"t.tar": [1, 2]})
    assert [key for key, *_ in pieces(part)] == ["s0", "s3"]
    assert part.counts.excluded == 2 and part.digest == whole.digest
    assert whole.quarantine == "none" and part.quarantine.startswith("2 samples (")


def test_what_a_run_never_sees_is_told_in_one_line():
    assert table(Shard("t.tar", [50, 250])).unused() is None
    told = table(Shard("i.tar", [90, 300], [1, 1], rejected=2), excluded={"i.tar": [0]}, oversize="truncate").unused()
    assert told == "data.sources.s: of 4 samples 2 rejected by the index, 1 in quarantine, 1 truncated"


def test_shards_by_name_and_glob():
    index = Index(*(Shard(f"{kind}-{n}.tar", [10 + n]) for kind in "ab" for n in range(2)))
    made = SourceTable("s", Source(["b-1.tar", "a-*.tar", "b-1.tar"]), index, Limits(100, 8))
    assert [made.locate(i)[0].shard for i in range(3)] == ["b-1.tar", "a-0.tar", "a-1.tar"]


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (Shard("t.tar", []), "no samples: its shards are empty"),
        (Shard("t.tar", [], rejected=7), "no good samples: t.tar: sample 'k': broken"),
        (Shard("i.tar", [300], [1], [300]), "all 1 are larger than a pack, such as i.tar: sample 's0' with 300 tokens"),
    ],
)
def test_a_source_without_samples_says_why(shard, message):
    with pytest.raises(UserError, match=f"data.sources.s has no .*{message}|data.sources.s has {message}"):
        table(shard)
