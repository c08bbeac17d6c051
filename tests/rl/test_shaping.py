"""Response length and distance from the reference, in rewards and masks."""

import pytest
import torch

from nemo_bluelm.errors import UserError
from nemo_bluelm.rl.segments import Segments
from nemo_bluelm.rl.shaping import kl_in_reward, overlong_filter, soft_overlong_punishment

SEGMENTS = Segments.of_lengths([2, 3, 1])


def test_soft_overlong_punishment():
    lengths = torch.tensor([0, 80, 85, 90, 100, 101, 9999])
    got = soft_overlong_punishment(lengths, max_length=100, buffer_length=20)
    assert got.tolist() == pytest.approx([0, 0, -0.25, -0.5, -1, -1, -1])
    assert (soft_overlong_punishment(lengths, 100, 20, penalty=0.4) / got)[2:].tolist() == pytest.approx([0.4] * 5)


def test_no_buffer():
    assert soft_overlong_punishment(torch.tensor([99, 100, 101]), 100, 0).tolist() == [0, 0, -1]
    for buffer in (-1, 101):
        with pytest.raises(UserError, match="buffer_length"):
            soft_overlong_punishment(torch.tensor([1]), 100, buffer)


def test_overlong_filter():
    mask = torch.tensor([1.0, 0, 1, 1, 1, 1])
    got = overlong_filter(mask, torch.tensor([False, True, False]), SEGMENTS)
    assert got.tolist() == [1, 0, 0, 0, 0, 1] and got.dtype == mask.dtype


def test_kl_in_reward():
    kl = torch.tensor([1.0, torch.nan, 0.5, 0.25, -1.0, 2.0], requires_grad=True)
    mask = torch.tensor([1, 0, 1, 1, 1, 1])
    got = kl_in_reward(torch.tensor([1.0, 1.0, 0.0]), kl, mask, SEGMENTS, coefficient=0.1)
    assert got.tolist() == pytest.approx([0.9, 1.025, -0.2]) and not got.requires_grad
