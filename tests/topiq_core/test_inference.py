"""The fast form of the network computes what the plain one does, whatever the strips are."""

from copy import deepcopy
from functools import lru_cache

import pytest
import torch
from golden.parameters import TOLERANCE, fill, noisy, picture

from topiq_core.cards import Architecture
from topiq_core.cfanet import CFANet, CrossAttentionLayer, SelfAttentionLayer
from topiq_core.inference import InferenceNet, ProductsIn, Strips

# As narrow as strips get: a few rows each, at every level of a picture of this height.
NARROWEST = Strips(1, 1)
SIZES = [(431, 64), (397, 45), (64, 431), (33, 32)]


@lru_cache(maxsize=1)
def plain(mode, backbone, grid=0):
    return fill(CFANet(Architecture(mode, backbone, 32, heads=2, gate_dim=8, grid=grid)))


def image(frame):
    return torch.from_numpy(frame).permute(2, 0, 1)[None]


@pytest.mark.parametrize("grid", [0, 2])
@pytest.mark.parametrize("backbone", ["resnet50", "mobilenet_v2"])
@pytest.mark.parametrize("mode", ["nr", "fr"])
def test_scores_in_strips_are_those_of_the_plain_network(backbone, mode, grid):
    net = plain(mode, backbone, grid)
    whole = InferenceNet(deepcopy(net))
    strips = InferenceNet(deepcopy(net), strips=NARROWEST)
    for seed, size in enumerate(SIZES):
        frame = picture(seed, *size)
        sides = [image(frame)] if mode == "nr" else [image(noisy(frame, seed)), image(frame)]
        with torch.inference_mode():
            expected = float(net(*(side / 255 for side in sides)))
            assert float(whole(*sides)) == pytest.approx(expected, abs=TOLERANCE)
            assert float(strips(*sides)) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("backbone", ["resnet50", "mobilenet_v2"])
def test_every_level_is_the_plain_networks_at_the_seams_of_strips(backbone):
    """A score averages over a picture; a wrong row between two strips would hardly move it."""
    net = plain("nr", backbone)
    strips = InferenceNet(deepcopy(net), strips=NARROWEST)
    x = image(picture(5, 1090, 40))
    with torch.inference_mode():
        expected = net.semantic_model(strips.entry(x))
        for whole, found in zip(expected, strips.levels(x), strict=True):
            assert found.shape == whole.shape
            assert float((found - whole).abs().max()) <= 1e-4 * float(whole.abs().max())


@pytest.mark.parametrize("mode", ["nr", "fr"])
def test_a_limited_grid_averages_large_images_and_leaves_small_ones(mode):
    free, limited = plain(mode, "mobilenet_v2"), deepcopy(plain(mode, "mobilenet_v2", 3))
    limited.load_state_dict(free.state_dict())
    counts = []
    limited.attn_pool.register_forward_pre_hook(lambda _, tokens: counts.append(tokens[0].shape[1]))
    for (height, width), (rows, columns) in {(96, 200): (3, 7), (97, 300): (3, 8)}.items():
        frame = picture(0, height, width)
        sides = [image(frame) / 255] if mode == "nr" else [image(noisy(frame, 0)) / 255] * 2
        with torch.inference_mode():
            same = float(free(*sides)) == pytest.approx(float(limited(*sides)), abs=TOLERANCE)
        assert counts.pop() == rows * columns
        assert same == (height <= 96)


def test_a_batch_is_scored_as_its_images_are():
    net = InferenceNet(deepcopy(plain("nr", "mobilenet_v2")), strips=NARROWEST)
    batch = torch.cat([image(picture(seed, 200, 64)) for seed in range(3)])
    with torch.inference_mode():
        alone = torch.cat([net(x[None]) for x in batch])
        assert net(batch).tolist() == pytest.approx(alone.tolist(), abs=TOLERANCE)


@pytest.mark.parametrize("products", [None, torch.float16])
@pytest.mark.parametrize("mode", ["nr", "fr"])
def test_a_sixteen_bit_network_scores_as_fp32_but_for_rounding(mode, products):
    """Scores span several units here, and an untrained network amplifies what is rounded."""
    net = plain(mode, "mobilenet_v2")
    exact = InferenceNet(deepcopy(net))
    errors = {"fp16": 0.0, "bf16": 0.0}
    for precision in errors:
        rounded = InferenceNet(deepcopy(net), precision)
        if products is not None:
            rounded.narrow_products(products)
        for seed in range(2):
            frame = picture(seed, 97, 64)
            sides = [image(frame)] if mode == "nr" else [image(noisy(frame, seed)), image(frame)]
            with torch.inference_mode():
                error = abs(float(rounded(*sides) - exact(*sides)))
            errors[precision] = max(errors[precision], error)
    assert 0 < errors["fp16"] < 0.1
    assert errors["fp16"] < errors["bf16"] < 0.5


@pytest.mark.parametrize(("kind", "bound"), [(torch.float16, 3e-3), (torch.bfloat16, 0.02)])
def test_products_of_tokens_in_sixteen_bits_stay_near_those_in_fp32(kind, bound):
    torch.manual_seed(4)
    tokens, memory = torch.randn(2, 30, 64), torch.randn(2, 50, 64)
    for block, given in (
        (SelfAttentionLayer(64, 4, 0.0), (tokens,)),
        (CrossAttentionLayer(64, 4, 0.0), (tokens, memory)),
    ):
        ours = ProductsIn(kind, deepcopy(block.eval()))
        with torch.inference_mode():
            expected, found = block(*given), ours(*given)
        assert found.dtype == torch.float32
        assert not torch.equal(found, expected)
        torch.testing.assert_close(found, expected, atol=bound, rtol=0)


def test_one_reference_serves_a_batch_of_renditions():
    net = InferenceNet(deepcopy(plain("fr", "mobilenet_v2")), strips=NARROWEST)
    frame = picture(0, 200, 64)
    renditions = torch.cat([image(noisy(frame, seed)) for seed in range(3)])
    with torch.inference_mode():
        expected = net(renditions, image(frame).expand(3, -1, -1, -1))
        maps = list(net.levels(image(frame)))
        assert net(renditions, maps).tolist() == pytest.approx(expected.tolist(), abs=TOLERANCE)


def test_position_embeddings_are_kept_for_few_grids_only():
    net = InferenceNet(deepcopy(plain("nr", "mobilenet_v2")))
    with torch.inference_mode():
        for width in range(32, 32 * 20, 32):
            net(torch.zeros(1, 3, 32, width, dtype=torch.uint8))
    assert 1 < len(net._positions) <= 16
