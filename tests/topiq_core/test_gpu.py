"""What a scorer promises on a GPU. Skipped where there is none."""

import numpy as np
import pytest
import torch
from golden.parameters import TOLERANCE, fill, noisy, picture, scores

from topiq_core.cards import PUBLISHED
from topiq_core.cfanet import CFANet
from topiq_core.convolution import FusedConv
from topiq_core.scorer import Scorer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

SIZES = [(64, 64), (480, 640), (64, 64), (640, 480), (64, 64), (480, 640), (97, 131)]
FRAMES = [picture(seed, *size) for seed, size in enumerate(SIZES)]


def on_gpu(name, precision="fp32"):
    card = PUBLISHED[name]
    net = fill(CFANet(card.architecture))
    return Scorer(net, card, torch.device("cuda"), precision=precision)


@pytest.mark.parametrize("name", sorted(scores()))
def test_golden_scores_are_the_same_on_a_gpu(name):
    scorer = on_gpu(name)
    for case in scores()[name]:
        frame = picture(case["seed"], case["height"], case["width"])
        if scorer.card.architecture.mode == "nr":
            assert abs(scorer.score([frame])[0] - case["score"]) <= TOLERANCE
            continue
        distorted = noisy(frame, case["seed"])
        found = scorer.score_pairs([distorted, frame], [frame, frame])
        assert abs(found[0] - case["score"]) <= TOLERANCE
        assert abs(found[1] - case["identical"]) <= TOLERANCE


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", ["cfanet_lite_nr", "cfanet_lite_fr"])
def test_a_gpu_scores_as_a_cpu_does_whatever_the_batch(name, precision):
    on_cpu, on_gpu = (
        Scorer.load(name, device=device, precision=kind)
        for device, kind in (("cpu", "fp32"), ("cuda", precision))
    )
    given = [FRAMES]
    if on_cpu.card.architecture.mode == "fr":
        given = [[noisy(frame, seed) for seed, frame in enumerate(FRAMES)], FRAMES]
    score = [s.score if len(given) == 1 else s.score_pairs for s in (on_cpu, on_gpu)]
    expected, found = (run(*given) for run in score)
    bound = {"fp32": 2e-5, "fp16": 5e-3, "bf16": 3e-2}[precision]
    assert np.abs(found - expected).max() <= bound
    on_gpu.batch_pixels = 1
    alone = score[1](*given)
    assert np.abs(found - alone).max() <= bound


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_sums_and_activations_within_a_kernel_change_no_score(precision):
    scorer = on_gpu("topiq_nr", precision)
    whole = scorer.score(FRAMES)
    convolutions = [m for m in scorer.net.modules() if isinstance(m, FusedConv) and m.by_cudnn]
    if torch.version.cuda:
        # All of ResNet-50's with a ReLU after them but the first: none fell back.
        assert len(convolutions) == 48
    for convolution in convolutions:
        convolution.by_cudnn = False
    in_steps = scorer.score(FRAMES)
    exact = on_gpu("topiq_nr").score(FRAMES)
    bound = {"fp16": 5e-3, "bf16": 3e-2}[precision]
    assert np.abs(whole - exact).max() <= bound
    assert np.abs(in_steps - exact).max() <= bound


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_was_in_memory_before_is_in_no_score(precision):
    scorer = on_gpu("topiq_nr", precision)
    expected = scorer.score(FRAMES)
    torch.cuda.empty_cache()
    left = [torch.full((1 << 28,), torch.nan, device="cuda")]
    left += [torch.full((1 << 17,), torch.nan, device="cuda") for _ in range(256)]
    del left  # its room is what the next maps are made in
    assert np.array_equal(scorer.score(FRAMES), expected)


def test_renditions_score_as_their_pairs_do_on_a_gpu():
    scorer = on_gpu("topiq_fr")
    renditions = [noisy(FRAMES[1], seed) for seed in range(3)]
    expected = scorer.score_pairs(renditions, [FRAMES[1]] * 3)
    found = scorer.score_renditions(renditions, FRAMES[1])
    assert np.abs(found - expected).max() <= 2e-5


def test_frames_may_lie_on_the_gpu_already_whatever_the_scorer_is_on():
    for device in ("cpu", "cuda"):
        scorer = Scorer.load(device=device)
        there = [torch.from_numpy(frame).cuda() for frame in FRAMES]
        assert np.abs(scorer.score(there) - scorer.score(FRAMES)).max() <= 2e-5
