"""A precision is refused for a model that it would make rank pictures otherwise."""

import numpy as np
import pytest
import torch
from golden.parameters import fill
from scipy import stats

from topiq_core import agreement
from topiq_core.cards import Architecture, Card
from topiq_core.cfanet import CFANet
from topiq_core.errors import CardError
from topiq_core.scorer import Scorer


def small(mode):
    architecture = Architecture(mode, "mobilenet_v2", inter_dim=32, heads=2, gate_dim=8)
    card = Card(f"small_{mode}", architecture, "", "", "", "")
    return Scorer(fill(CFANet(architecture)), card, torch.device("cpu"))


def test_every_picture_of_the_check_is_another_one_and_paired_with_a_scene_of_its_size():
    scenes, degraded = agreement.pictures()
    assert len({picture.tobytes() for picture in degraded}) == len(degraded) == len(scenes)
    assert {p.shape for p in scenes + degraded} == {(128, 160, 3)}


def test_the_pictures_are_the_same_at_every_load():
    for first, again in zip(agreement.pictures(), agreement.pictures(), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_rank_correlation_is_that_of_scipy():
    draw = np.random.default_rng(0)
    left = draw.random(50, np.float32)
    right = left + 0.3 * draw.random(50, np.float32)
    expected = stats.spearmanr(left, right).statistic
    assert agreement.srocc(left, right) == pytest.approx(expected, abs=1e-12)


def test_agreement_is_measured_on_scores_and_falls_with_the_precision_of_weights():
    exact, eight_bits, three_bits = small("nr"), small("nr"), small("nr")
    for buffer in eight_bits.net.stages.buffers():
        buffer.copy_(buffer.bfloat16())
    for buffer in three_bits.net.stages.buffers():
        buffer.copy_(buffer.to(torch.float8_e5m2))
    assert 1 > eight_bits.agreement_with(exact) > three_bits.agreement_with(exact)


def test_a_full_reference_network_agrees_with_itself_on_pairs():
    scorer = small("fr")
    assert scorer.agreement_with(scorer) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("measured", [0.9949, -1.0, float("nan")])
def test_a_precision_that_ranks_otherwise_is_refused_with_what_was_measured(measured):
    with pytest.raises(CardError, match=rf"small in bf16 .*{measured:.4f}"):
        agreement.require("bf16", measured, "small")


def test_scores_that_are_not_numbers_agree_with_nothing():
    scores = np.array([1, 2, np.nan], np.float32)
    assert np.isnan(agreement.srocc(scores, scores))
