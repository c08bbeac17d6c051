"""Every kind of good and broken file in every backend: the same verdicts, and neighbours that take no harm."""

import pytest
import torch
from fault_corpus import encode, fault_corpus, photo

from nemo_bluelm.data.decode import BACKENDS, BadSample, get_backend
from nemo_bluelm.geometry import Geometry

TINY = Geometry(tile=56)
CORPUS = fault_corpus()
NEIGHBOURS = [encode(photo("RGB", 120, 90), "JPEG"), encode(photo("RGB", 90, 40), "PNG")]


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return get_backend(request.param)


@pytest.fixture(scope="module")
def alone(backend):
    """The neighbours' tiles when each is all there is."""
    return [backend.tiles([data], TINY)[0] for data in NEIGHBOURS]


def check(result, good):
    if good:
        assert isinstance(result, torch.Tensor) and result.shape[1:] == (3, 56, 56)
    else:
        assert isinstance(result, BadSample)
        assert result.reason and "\n" not in result.reason


@pytest.mark.parametrize("kind", CORPUS)
def test_each_kind_between_good_neighbours(backend, alone, kind):
    first, result, last = backend.tiles([NEIGHBOURS[0], CORPUS[kind].data, NEIGHBOURS[1]], TINY)
    assert torch.equal(first, alone[0]) and torch.equal(last, alone[1])
    check(result, CORPUS[kind].good)


def test_all_kinds_at_once(backend):
    results = backend.tiles([case.data for case in CORPUS.values()], TINY)
    for result, (kind, case) in zip(results, CORPUS.items()):
        check(result, case.good)
        if case.good:
            assert torch.equal(result, backend.tiles([case.data], TINY)[0]), kind


def test_many_bad_ones_in_a_row(backend, alone):
    """Failing batches leave the backend as it was."""
    bad = CORPUS["jpeg-broken-huffman-table"].data
    for _ in range(3):
        assert all(isinstance(result, BadSample) for result in backend.tiles([bad] * 5, TINY))
        assert torch.equal(backend.tiles([NEIGHBOURS[0]], TINY)[0], alone[0])


def test_the_corpus_reaches_dalis_decoder():
    """Bisection is put to the test only by a file that passes the header and makes DALI fail."""
    pytest.importorskip("nvidia.dali")
    backend, asked = get_backend("dali"), []
    run = backend._run
    backend._run = lambda encoded, jobs, *rest: (asked.append((encoded, len(jobs))), run(encoded, jobs, *rest))
    results = backend.tiles([NEIGHBOURS[0]] * 3 + [CORPUS["jpeg-broken-huffman-table"].data], TINY)
    assert [isinstance(result, BadSample) for result in results] == [False, False, False, True]
    assert asked == [(True, 4), (True, 2), (True, 2), (True, 1), (True, 1)]
