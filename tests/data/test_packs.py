"""A row of documents: labels, positions, offsets, masks; nothing lost."""

import pytest
import torch

from nemo_bluelm.data.chat import Encoded
from nemo_bluelm.data.packs import PackedBatch, collate, join

NO_TILES = torch.empty(0, 3, 4, 4, dtype=torch.uint8)


def document(*tokens, targets=()):
    return Encoded(list(tokens), [token in targets for token in tokens])


def test_golden_row():
    documents = [document(5, 6, 7, targets=(6, 7)), document(8, 9, 10, 11, 12, targets=(8, 11, 12))]
    pack = collate(documents, NO_TILES, sequence_length=16, alignment=4, pad=0)
    assert pack.tokens.tolist() == [[5, 6, 7, 0, 8, 9, 10, 11, 12, 0, 0, 0, 0, 0, 0, 0]]
    assert pack.labels.tolist() == [[6, 7, 0, 0, 9, 10, 11, 12, 0, 0, 0, 0, 0, 0, 0, 0]]
    assert pack.loss_mask.tolist() == [[1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]]
    assert pack.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]]
    assert pack.cu_seqlens.tolist() == [0, 3, 8, 8]
    assert pack.cu_seqlens_padded.tolist() == [0, 4, 12, 16]
    assert pack.max_seqlen == 8
    assert pack.num_tokens == 4
    dtypes = [
        pack.tokens.dtype,
        pack.labels.dtype,
        pack.position_ids.dtype,
        pack.loss_mask.dtype,
        pack.cu_seqlens.dtype,
    ]
    assert dtypes == [torch.int64] * 3 + [torch.float32, torch.int32]


def test_full_row_has_no_tail():
    pack = collate([document(1, 2), document(3, 4)], NO_TILES, sequence_length=4, alignment=2, pad=0)
    assert pack.cu_seqlens.tolist() == pack.cu_seqlens_padded.tolist() == [0, 2, 4]


def test_empty_row_is_all_tail():
    pack = collate([], NO_TILES, sequence_length=4, alignment=2, pad=9)
    assert pack.tokens.tolist() == [[9, 9, 9, 9]] and pack.num_tokens == 0
    assert pack.cu_seqlens_padded.tolist() == [0, 4] and pack.cu_seqlens.tolist() == [0, 0]


@pytest.mark.parametrize("alignment", [1, 2, 8, 16])
def test_every_document_is_found_again(alignment):
    generator = torch.Generator().manual_seed(0)
    documents = []
    for length in (3, 16, 1, 31, 8):
        ids = torch.randint(1, 1000, (length,), generator=generator).tolist()
        documents.append(Encoded(ids, [i % 3 > 0 for i in range(length)]))
    pack = collate(documents, NO_TILES, sequence_length=160, alignment=alignment, pad=0)
    assert pack.cu_seqlens_padded[-1] == 160 and pack.cu_seqlens[-1] == sum(len(d.tokens) for d in documents)
    assert (pack.cu_seqlens_padded % alignment == 0).all()
    for k, d in enumerate(documents):
        start, length = int(pack.cu_seqlens_padded[k]), len(d.tokens)
        assert pack.cu_seqlens[k + 1] - pack.cu_seqlens[k] == length
        assert pack.tokens[0, start : start + length].tolist() == d.tokens
        assert pack.position_ids[0, start : start + length].tolist() == list(range(length))
        assert pack.labels[0, start : start + length - 1].tolist() == d.tokens[1:]
        assert pack.loss_mask[0, start : start + length - 1].tolist() == d.loss_mask[1:]
        end = int(pack.cu_seqlens_padded[k + 1])
        assert pack.loss_mask[0, start + length - 1 : end].sum() == 0
    assert pack.num_tokens == sum(sum(d.loss_mask[1:]) for d in documents)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="more than 4"):
        collate([document(1, 2, 3), document(4)], NO_TILES, sequence_length=4, alignment=2, pad=0)
    with pytest.raises(ValueError, match="multiple"):
        collate([], NO_TILES, sequence_length=5, alignment=2, pad=0)


def test_to_moves_every_tensor():
    pack = collate([document(1, 2)], NO_TILES, sequence_length=4, alignment=1, pad=0).to("meta")
    tensors = [value for value in vars(pack).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 7 and all(tensor.is_meta for tensor in tensors)
    assert pack.max_seqlen == 2


def test_the_text_travels_whole():
    documents = [document(5, 6, 70_000, targets=(6, 70_000)), document(8, 9, targets=(9,))]
    tiles = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    pack = collate(documents, tiles, sequence_length=16, alignment=4, pad=0)
    told = PackedBatch.text_from_bytes(pack.text_to_bytes())
    assert told.tiles.is_meta and told.tiles.shape == tiles.shape and told.tiles.dtype == torch.uint8
    assert told.max_seqlen == pack.max_seqlen
    for name in ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens", "cu_seqlens_padded"):
        assert torch.equal(getattr(told, name), getattr(pack, name))
        assert getattr(told, name).dtype == getattr(pack, name).dtype


def test_joined_packs_lie_end_to_end():
    """Everything but the offsets is a concatenation, and each segment keeps its place and length in its pack."""
    first = collate([document(5, 6, 7, targets=(6,)), document(8)], NO_TILES, sequence_length=8, alignment=4, pad=0)
    tile = torch.full((2, 3, 4, 4), 7, dtype=torch.uint8)
    second = collate([document(9, 10, 11, 12, 13, targets=(13,))], tile, sequence_length=16, alignment=4, pad=0)
    row = join([first, second, first])
    assert row.tokens.tolist() == [[5, 6, 7, 0, 8, 0, 0, 0, *(9, 10, 11, 12, 13), *[0] * 11, 5, 6, 7, 0, 8, 0, 0, 0]]
    for name in ("tokens", "labels", "loss_mask", "position_ids"):
        parts = [getattr(pack, name) for pack in (first, second, first)]
        assert torch.equal(getattr(row, name), torch.cat(parts, 1)) and getattr(row, name).dtype == parts[0].dtype
    assert row.cu_seqlens_padded.tolist() == list(row.bounds) == [0, 4, 8, 16, 24, 28, 32]
    assert row.cu_seqlens.tolist() == [0, 3, 4, 9, 9, 12, 13]
    assert row.cu_seqlens.dtype == row.cu_seqlens_padded.dtype == torch.int32
    assert row.max_seqlen == 8 and row.num_tokens == 3
    assert torch.equal(row.tiles, tile)
    assert join([first]) is first


def test_bounds_stay_on_the_host():
    pack = collate([document(1, 2, 3)], NO_TILES, sequence_length=8, alignment=4, pad=0)
    assert pack.bounds == (0, 4, 8) and pack.to("meta").bounds == (0, 4, 8)


def test_packs_of_one_document_are_a_dense_batch():
    short = collate([document(1, 2, 3, targets=(2,))], NO_TILES, sequence_length=8, alignment=2, pad=0)
    full = collate([document(*range(1, 9), targets=(5,))], NO_TILES, sequence_length=8, alignment=2, pad=0)
    empty = collate([], NO_TILES, sequence_length=8, alignment=2, pad=0)
    row = join([short, full, empty])
    dense = row.of_one_document_each(3)
    assert dense.bounds == (0, 8, 16, 24) and dense.equal_segments == 3 and dense.max_seqlen == 8
    assert dense.cu_seqlens.tolist() == [0, 3, 11, 11] and torch.equal(dense.labels, row.labels)
    assert row.equal_segments == 0 and full.equal_segments == 1 and join([full, full]).equal_segments == 2
    two = collate([document(1, 2), document(3, 4)], NO_TILES, sequence_length=8, alignment=2, pad=0)
    with pytest.raises(ValueError, match="not 2 packs of one document"):
        join([full, two]).of_one_document_each(2)


def test_a_fixed_shape_does_not_depend_on_the_pack():
    one = collate([document(*range(1, 9))], NO_TILES, sequence_length=8, alignment=2, pad=0)
    two = collate([document(1, 2), document(3, 4)], NO_TILES, sequence_length=8, alignment=2, pad=0)
    shapes = {
        (len(p.cu_seqlens), p.max_seqlen, p.equal_segments) for p in (one.of_fixed_shape(3), two.of_fixed_shape(3))
    }
    assert shapes == {(4, 8, 0)}
