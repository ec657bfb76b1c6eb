"""Winograd's convolution is the ordinary one, whatever the map's size."""

import pytest
import torch
import torch.nn.functional as F

from topiq_core import winograd


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 3), (2, 30), (37, 8)])
def test_it_gives_what_the_ordinary_convolution_gives(size):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, *size, generator=generator)
    weight = torch.randn(7, 5, 3, 3, generator=generator)
    bias = torch.randn(7, generator=generator)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    found = winograd.conv3x3(x, winograd.transformed(weight), bias)
    assert found.is_contiguous(memory_format=torch.channels_last) or 1 in size
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-4)


def test_a_map_of_many_blocks_has_no_seams(monkeypatch):
    monkeypatch.setattr(winograd, "_BLOCK", 1)
    x = torch.randn(2, 4, 41, 9, generator=torch.Generator().manual_seed(2))
    weight = torch.randn(3, 4, 3, 3, generator=torch.Generator().manual_seed(3))
    found = winograd.conv3x3(x, winograd.transformed(weight), torch.zeros(3))
    torch.testing.assert_close(found, F.conv2d(x, weight, padding=1), rtol=0, atol=3e-4)
