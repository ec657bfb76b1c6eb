"""Convolutions with what surrounds them are those of PyTorch, layer by layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from topiq_core import winograd
from topiq_core.convolution import FusedConv

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
}


@pytest.mark.parametrize("size", [(11, 14), (1, 5), (8, 1)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "groups"),
    [((16, 32), 1, 1, 1), ((16, 1), 3, 1, 1), ((16, 1), 3, 2, 1), ((8, 8), 3, 2, 8)],
)
def test_a_fused_convolution_is_that_of_pytorch(channels, kernel, stride, groups, activation, size):
    torch.manual_seed(3)
    conv = nn.Conv2d(*channels, kernel, stride, kernel // 2, groups=groups)
    x = torch.randn(2, channels[0], *size)
    ours = FusedConv.of(conv, None, activation)
    with torch.inference_mode():
        expected = ACTIVATIONS[activation](conv(x))
        for form in (x, x.to(memory_format=torch.channels_last)):
            torch.testing.assert_close(ours(form), expected, atol=1e-5, rtol=1e-5)


def test_a_sum_is_taken_before_the_activation():
    torch.manual_seed(4)
    conv, norm = nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    x, added = torch.randn(2, 8, 5, 6), torch.randn(2, 12, 5, 6)
    with torch.inference_mode():
        expected = F.relu(norm(conv(x)) + added)
        out = FusedConv.of(conv, norm, "relu")(x, added.clone())
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_a_wide_convolution_is_that_of_pytorch_on_small_maps_and_on_large_ones_in_turn():
    torch.manual_seed(5)
    channels = winograd.LEAST_CHANNELS
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    ours = FusedConv.of(conv, None, "relu")
    sizes = [(4, 5), (40, 33), (12, 16), (40, 33), (4, 5)]
    maps = [torch.randn(1, channels, *size) for size in sizes]
    assert [winograd.pays(x) for x in maps] == [False, True, False, True, False]
    with torch.inference_mode():
        for x in maps:
            found = ours(x.to(memory_format=torch.channels_last))
            torch.testing.assert_close(found, F.relu(conv(x)), atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kernel", "stride", "size"),
    [(1, 1, (9, 14)), (3, 1, (9, 14)), (3, 2, (9, 14)), (3, 2, (8, 1))],
)
def test_what_cudnn_may_read_in_place_of_a_sum_is_memory_of_its_input(kernel, stride, size):
    conv = torch.nn.Conv2d(16, 16, kernel, stride, kernel // 2)
    x = torch.randn(3, 16, *size).contiguous(memory_format=torch.channels_last)
    found = FusedConv.of(conv, None, "relu")._beside(x)
    assert found.shape == conv(x).shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert found.data_ptr() == x.data_ptr()
    assert found.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_an_input_that_is_too_small_or_has_gaps_stands_for_no_sum():
    widening, keeping = (
        FusedConv.of(torch.nn.Conv2d(16, out, 1), None, "relu") for out in (24, 16)
    )
    x = torch.randn(3, 16, 9, 14).contiguous(memory_format=torch.channels_last)
    assert widening._beside(x) is None
    assert keeping._beside(x) is not None
    assert keeping._beside(x[:, :, 2:7]) is None
