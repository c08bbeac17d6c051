"""The next-token loss of packs, whole and by source."""

import pytest

from nemo_bluelm.runtime.environment import prepare

prepare()

import torch  # noqa: E402

from nemo_bluelm.data.chat import Encoded  # noqa: E402
from nemo_bluelm.data.packs import collate, join  # noqa: E402
from nemo_bluelm.runtime.single import single_process_world  # noqa: E402
from nemo_bluelm.train.losses import TokenLoss  # noqa: E402


def pack(*documents):
    """A pack of (source, length) documents; every second token is a target."""
    encoded = [Encoded(list(range(1, n + 1)), [i % 2 == 0 for i in range(n)]) for _, n in documents]
    return collate(encoded, torch.empty(0, 3, 4, 4, dtype=torch.uint8), 32, 4, 0, [source for source, _ in documents])


def test_sources_are_told_apart_and_add_up():
    """Two micro-batches, the first of two packs in a row; nothing of the source in the middle is there."""
    batches = [join([pack((0, 7), (2, 10)), pack((2, 5), (0, 3), (2, 9))]), pack((0, 12))]
    losses = [torch.rand(1, batch.tokens.size(1)) for batch in batches]
    loss = TokenLoss(("text", "photos", "digits"))
    with single_process_world():
        mean = loss.reduce([loss.forward(batch, rows)[2] for batch, rows in zip(batches, losses)])
    flat = torch.cat([rows[0] for rows in losses])
    targets = torch.cat([batch.loss_mask[0] for batch in batches]).bool()
    sources = torch.cat([batch.sources[0] for batch in batches])
    assert mean.item() == pytest.approx(flat[targets].mean().item())
    for place in (0, 2):
        expected = flat[targets & (sources == place)].mean().item()
        assert loss.by_source[place].item() == pytest.approx(expected)
    assert loss.by_source[1].isnan()
    assert (sources == 0)[:7].all() and (sources == 2)[8:18].all(), "documents take 8 and 12 places"


def test_without_sources_there_is_the_mean_alone():
    batch = pack((0, 9), (1, 9))
    loss, rows = TokenLoss(), torch.rand(1, 32)
    with single_process_world():
        mean = loss.reduce([loss.forward(batch, rows)[2]])
    assert mean.item() == pytest.approx(rows[0][batch.loss_mask[0].bool()].mean().item())
    assert loss.by_source.numel() == 0


def test_sources_travel_between_ranks():
    batch = pack((3, 9), (1, 9))
    again = type(batch).text_from_bytes(batch.text_to_bytes())
    assert torch.equal(again.sources, batch.sources) and again.sources.dtype == torch.uint8
