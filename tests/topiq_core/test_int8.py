"""The 8-bit network ranks pictures as fp32 does, and its parts compute what they say."""

from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden.parameters import fill, noisy, picture
from scipy import ndimage

from jobs.sample_media import landscape
from topiq_core import agreement, weights
from topiq_core.cards import Architecture
from topiq_core.cfanet import CFANet
from topiq_core.convolution import HAS_VNNI, FusedConv
from topiq_core.inference import InferenceNet, Strips
from topiq_core.int8 import (
    Affine,
    Int8Conv,
    _convolutions,
    _equalise,
    _equalise_bottlenecks,
    _Framed,
    _Known,
    _MaxPool,
    _observed,
    _rounded,
    quantise,
)
from topiq_core.scorer import Scorer

needs_vnni = pytest.mark.skipif(not HAS_VNNI, reason="this CPU has no AVX-512 VNNI")


def image(frame):
    return torch.from_numpy(frame).permute(2, 0, 1)[None]


def stored(affine, x):
    """Real values to uint8 in channels-last memory, by the definition."""
    numbers = (x / affine.scale + affine.zero).round().clamp(0, 255)
    return numbers.to(torch.uint8).contiguous(memory_format=torch.channels_last)


def real(affine, x):
    return (x.float() - affine.zero) * affine.scale


@needs_vnni
@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "groups", "activation", "added"),
    [
        ((64, 64), 3, 1, 1, "relu", False),
        ((64, 128), 1, 2, 1, "none", False),
        ((3, 64), 7, 2, 1, "relu", False),
        ((32, 32), 3, 2, 32, "relu6", False),
        ((96, 24), 1, 1, 1, "none", True),
        ((64, 256), 1, 1, 1, "relu", True),
        ((64, 48), 1, 1, 1, "gelu", False),
    ],
)
def test_a_convolution_of_stored_maps_is_within_a_step_of_the_real_one(
    channels, kernel, stride, groups, activation, added
):
    torch.manual_seed(kernel)
    conv = torch.nn.Conv2d(*channels, kernel, stride, kernel // 2, groups=groups)
    x = torch.randn(2, channels[0], 21, 24)
    taken = Affine.covering(float(x.min()), float(x.max()))
    numbers = stored(taken, x)
    with torch.inference_mode():
        scale = conv.weight.abs().amax((1, 2, 3), keepdim=True) / 127
        conv.weight.copy_((conv.weight / scale).round() * scale)  # so that no rounding is left
        expected = conv(real(taken, numbers))
        other = torch.randn_like(expected)
        plus = Affine.covering(float(other.min()), float(other.max()))
        other = stored(plus, other)
        if added:
            expected = expected + real(plus, other)
        limits = {"relu": (0, np.inf), "relu6": (0, 6)}.get(activation, (-np.inf, np.inf))
        expected = F.gelu(expected) if activation == "gelu" else expected.clamp(*limits)
        given = Affine.covering(float(expected.min()), float(expected.max()))
        known = _Known(conv.weight, conv.bias, x.mean((0, 2, 3)))
        ours = Int8Conv(FusedConv.of(conv, None, activation), known, taken, given, plus)
        out = ours(numbers, *([other] if added else []))
    assert out.dtype == torch.uint8
    assert float((real(given, out) - expected).abs().max()) <= 0.51 * given.scale


@needs_vnni
def test_a_product_of_rows_is_that_of_every_position():
    """Of a strip of two pictures, whose rows do not lie together."""
    torch.manual_seed(3)
    conv = torch.nn.Conv2d(16, 32, 1)
    x = stored(Affine(0.02, 100), torch.randn(2, 16, 12, 10))
    known = _Known(conv.weight.detach(), conv.bias.detach(), torch.zeros(16))
    ours = Int8Conv(FusedConv.of(conv, None, "gelu"), known, Affine(0.02, 100), None)
    with torch.inference_mode():
        whole, strip = ours(x), ours(x[:, :, 3:8])
        expected = F.gelu(conv(real(Affine(0.02, 100), x)))
    assert whole.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(strip, whole[:, :, 3:8], atol=1e-6, rtol=0)
    torch.testing.assert_close(whole, expected, atol=0.02, rtol=0)


def test_what_rounded_weights_do_to_a_mean_is_taken_off_the_bias():
    torch.manual_seed(1)
    conv = torch.nn.Conv2d(8, 4, 1)
    means = torch.rand(8) * 100
    known = _Known(conv.weight.detach(), conv.bias.detach(), means)
    ours = Int8Conv(FusedConv.of(conv), known, Affine(1.0, 0), None)
    rounded = ours.weight.float() * ours.scale[:, None, None, None]
    constant = means.view(1, 8, 1, 1)
    with torch.inference_mode():
        expected = conv(constant)
        uncorrected = F.conv2d(constant, rounded, conv.bias)
        corrected = F.conv2d(constant, rounded, ours.bias)
    assert float((uncorrected - expected).abs().max()) > 1e-2
    torch.testing.assert_close(corrected, expected, atol=1e-4, rtol=0)


def test_rounding_keeps_the_sums_of_kernels_and_moves_no_weight_by_more_than_one():
    torch.manual_seed(2)
    weight = torch.rand(64, 5, 3, 3) * 254 - 127
    rounded = _rounded(weight)
    assert torch.equal(rounded, rounded.round())
    assert float((rounded - weight).abs().max()) < 1
    assert float((weight.round() - weight).sum((2, 3)).abs().max()) > 1  # as nearest would
    assert float((rounded - weight).sum((2, 3)).abs().max()) <= 0.5 + 1e-4
    assert torch.equal(_rounded(weight[..., :1, :1]), weight[..., :1, :1].round())


@pytest.mark.parametrize("size", [(7, 9), (8, 8), (1, 2), (5, 6)])
def test_maxima_of_stored_maps_are_those_of_pytorch(size):
    x = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    expected = F.max_pool2d(x.float(), 3, 2, 1)
    assert torch.equal(_MaxPool()(x).float(), expected)


def test_pixels_are_framed_in_the_mean_colour():
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    x = image(picture(1, 6, 7))
    framed = _Framed(mean, 3)(x)
    assert framed.shape == (1, 3, 12, 13)
    assert torch.equal(framed[:, :, 3:-3, 3:-3], x)
    inside = torch.zeros(12, 13, dtype=torch.bool)
    inside[3:-3, 3:-3] = True
    assert framed[0, :, ~inside].unique(dim=1).flatten().tolist() == [124, 116, 104]
    assert torch.equal(_Framed(mean, 3)(x / 255), framed)


@pytest.fixture(scope="module", params=["resnet50", "mobilenet_v2"])
def eight_bit(request):
    net = fill(CFANet(Architecture("nr", request.param, inter_dim=32, heads=2, gate_dim=8)))
    forms = [InferenceNet(deepcopy(net), "int8") for _ in range(2)]
    for form in forms:
        quantise(form, [image(picture(seed, 96, 128)) for seed in range(4)])
    forms[1].strips = Strips(1, 1)
    return forms


@needs_vnni
def test_stages_in_strips_are_those_of_the_whole_picture_but_for_ties(eight_bit):
    """oneDNN has other kernels for other shapes, and they may round one tie in 10^5 otherwise.

    Every stage is given the same map: such a tie grows from stage to stage.
    """
    x = image(picture(5, 431, 64))
    with torch.inference_mode():
        for level in range(5):
            whole, strips = (form._stage(level, x, form._strips_on(x).stage) for form in eight_bit)
            assert whole.dtype == torch.uint8
            assert whole.float().std() > 5
            assert (whole.float() - strips.float()).abs().mean() < 0.05
            x = whole


@needs_vnni
def test_the_bundled_model_ranks_pictures_in_8_bits_as_in_fp32():
    """Pictures of another kind and size than those that the ranges were taken from."""
    exact = Scorer.load("cfanet_lite_nr", device="cpu")
    ours = Scorer.load("cfanet_lite_nr", device="cpu", precision="int8")
    frames = []
    for seed in range(6):
        scene = landscape(192 + 16 * seed, 256, seed=seed)
        blurred = [ndimage.gaussian_filter(scene, sigma, axes=(0, 1)) for sigma in (0.7, 1, 2)]
        grain = np.random.Generator(np.random.PCG64(seed)).standard_normal(scene.shape)
        rough = [np.clip(scene + sigma * grain, 0, 255).astype(np.uint8) for sigma in (8, 20, 50)]
        coarse = [np.repeat(np.repeat(scene[::k, ::k], k, axis=0), k, axis=1) for k in (2, 4, 8)]
        frames += [scene, *blurred, *rough, *coarse]
    expected, scores = exact.score(frames), ours.score(frames)
    assert np.ptp(expected) > 0.2
    assert agreement.srocc(scores, expected) >= agreement.LEAST_SROCC
    assert not np.array_equal(scores, expected)  # or it would not be 8 bits


@needs_vnni
def test_what_strong_blur_leaves_is_scored_in_8_bits_nearly_as_in_fp32():
    """With its first stage in 8 bits the bundled model scored such pictures up to 0.1 higher."""
    exact = Scorer.load("cfanet_lite_nr", device="cpu")
    ours = Scorer.load("cfanet_lite_nr", device="cpu", precision="int8")
    scenes = [landscape(192 + 16 * seed, 256, seed=seed) for seed in range(6)]
    frames = [ndimage.gaussian_filter(s, sigma, axes=(0, 1)) for s in scenes for sigma in (3, 4, 6)]
    assert np.abs(ours.score(frames) - exact.score(frames)).max() < 0.08


@pytest.mark.parametrize(
    ("backbone", "levelled"), [("resnet50", _equalise), ("mobilenet_v2", _equalise_bottlenecks)]
)
@needs_vnni
def test_channels_are_levelled_without_changing_what_a_network_computes(backbone, levelled):
    plain = fill(CFANet(Architecture("nr", backbone)))
    exact, net = InferenceNet(deepcopy(plain)), InferenceNet(plain, "int8")
    frames = [image(p) for p in agreement.pictures()[1][:4]]
    with torch.inference_mode():
        expected = [float(exact(x)) for x in frames]
        known, seen = _observed(net, frames)
        stages = _convolutions(net.stages)
        if backbone == "mobilenet_v2":  # its ReLU6 keeps no factors, its first stage is in fp32
            stages = [c for c in _convolutions(net.stages[1:]) if c.activation == "none"]
        before = [_unevenness(seen[conv]) for conv in stages]
        levelled(net, known, seen)
        for conv, of in known.items():
            conv.replace(of.weight, of.bias)
        np.testing.assert_allclose([float(net(x)) for x in frames], expected, atol=1e-4)
        _, found = _observed(net, frames)
    for conv, was in found.items():  # the ranges that are taken over are those of the new maps
        torch.testing.assert_close(seen[conv].high, was.high, rtol=1e-3, atol=1e-3)
    assert np.mean([_unevenness(seen[conv]) for conv in stages]) < 0.7 * np.mean(before)


def _unevenness(seen):
    """Deviation of the logarithms of channels' ranges, of channels that reach anywhere."""
    reach = torch.maximum(-seen.low, seen.high)
    return float(reach[reach > 0.02 * reach.max()].log().std())


def test_a_published_network_ranks_pictures_in_8_bits_as_in_fp32():
    net = fill(CFANet(Architecture("nr", "resnet50")))
    exact, ours = InferenceNet(deepcopy(net)), InferenceNet(deepcopy(net), "int8")
    quantise(ours, [image(p) for p in agreement.pictures()[1]])
    frames = [image(picture(seed, 160, 128 + 16 * seed)) for seed in range(16)]
    frames += [image(noisy(picture(seed, 128, 160), seed)) for seed in range(16)]
    with torch.inference_mode():
        expected, scores = (
            np.array([float(form(x)) for x in frames], np.float32) for form in (exact, ours)
        )
    assert agreement.srocc(scores, expected) >= agreement.LEAST_SROCC


@needs_vnni
def test_an_8_bit_network_that_meets_unknown_values_gives_a_finite_score():
    net = weights.load(weights.resolve("cfanet_lite_nr"))
    ours = InferenceNet(net, "int8")
    quantise(ours, [torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)])  # a poor choice of ranges
    with torch.inference_mode():
        assert torch.isfinite(ours(image(picture(2, 64, 96)))).all()
