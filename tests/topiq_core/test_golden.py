"""The network computes what the method's own implementation computes, without any download."""

from copy import deepcopy
from functools import lru_cache

import pytest
import torch
from golden import parameters
from golden.parameters import TOLERANCE, fill, noisy, picture

from topiq_core.cards import PUBLISHED
from topiq_core.cfanet import CFANet
from topiq_core.errors import WeightsError
from topiq_core.scorer import Scorer, resized

GOLDEN = parameters.scores()


def cases(mode, outputs=None):
    return [
        pytest.param(name, case, id=f"{name}-{case['width']}x{case['height']}")
        for name, found in GOLDEN.items()
        for case in found
        if PUBLISHED[name].architecture.mode == mode
        and outputs in (None, PUBLISHED[name].architecture.outputs)
    ]


def frame(case):
    return picture(case["seed"], case["height"], case["width"])


@lru_cache(maxsize=1)
def golden_net(architecture):
    return fill(CFANet(architecture))


def golden_scorer(name):
    card = PUBLISHED[name]
    return Scorer(deepcopy(golden_net(card.architecture)), card, torch.device("cpu"))


def test_every_kind_of_published_card_has_golden_scores():
    assert set(GOLDEN) == {"topiq_nr", "topiq_nr-flive", "topiq_fr", "topiq_iaa_res50"}
    kinds = {(c.architecture, c.short_side is None) for c in PUBLISHED.values()}
    covered = {(PUBLISHED[n].architecture, PUBLISHED[n].short_side is None) for n in GOLDEN}
    assert kinds == covered
    assert all(len(found) == 6 for found in GOLDEN.values())


@pytest.mark.parametrize(("name", "case"), cases("nr"))
def test_no_reference_scores_are_the_golden_ones(name, case):
    (score,) = golden_scorer(name).score([frame(case)])
    assert abs(score - case["score"]) <= TOLERANCE


@pytest.mark.parametrize(("name", "case"), cases("fr"))
def test_full_reference_scores_are_the_golden_ones(name, case):
    reference = frame(case)
    distorted = noisy(reference, case["seed"])
    scores = golden_scorer(name).score_pairs([distorted, reference], [reference, reference])
    assert abs(scores[0] - case["score"]) <= TOLERANCE
    assert abs(scores[1] - case["identical"]) <= TOLERANCE


@pytest.mark.parametrize(("name", "case"), cases("nr", outputs=10))
def test_aesthetics_probabilities_are_the_golden_ones(name, case):
    card = PUBLISHED[name]
    image = torch.from_numpy(frame(case)).permute(2, 0, 1)[None].float() / 255
    size = resized(case["height"], case["width"], card.short_side)
    image = torch.nn.functional.interpolate(image, size, mode="bilinear", antialias=True)
    with torch.inference_mode():
        found = golden_net(card.architecture).distribution(image)
    golden = torch.tensor([case["probabilities"]])
    assert found.shape == (1, 10)
    assert (found - golden).abs().max() <= TOLERANCE


def test_a_level_no_higher_than_the_coarsest_keeps_its_own_grid():
    """The golden pictures are too large for this rule; it takes 16 rows to see it."""
    net = CFANet(PUBLISHED["topiq_nr"].architecture).eval()
    grids = {}
    for level, reduce in enumerate(net.dim_reduce):
        reduce.register_forward_hook(
            lambda _, __, out, level=level: grids.__setitem__(level, tuple(out.shape[2:]))
        )
    with torch.inference_mode():
        score = net(torch.zeros(1, 3, 16, 64))
    assert score.isfinite().all()
    # Before pooling: 8x32, 4x16, 2x8, 1x4 and 1x2.
    assert grids == {0: (1, 2), 1: (1, 2), 2: (1, 2), 3: (1, 4), 4: (1, 2)}


@pytest.mark.parametrize(
    ("mode", "entries"), [pytest.param("nr", 524, id="nr"), pytest.param("fr", 514, id="fr")]
)
def test_a_card_has_as_many_state_entries_as_its_published_checkpoint(mode, entries):
    for card in PUBLISHED.values():
        if card.architecture.mode == mode:
            assert len(empty_state(card)) == entries


def empty_state(card):
    """Every entry of a checkpoint, in its shape: one stored zero each, to keep the files small."""
    with torch.device("meta"):
        net = CFANet(card.architecture)
    return {k: torch.zeros((), dtype=t.dtype).expand(t.shape) for k, t in net.state_dict().items()}


def test_a_published_layout_checkpoint_loads_strictly_and_gives_the_golden_score(tmp_path):
    path = tmp_path / "published.pth"
    state = golden_net(PUBLISHED["topiq_nr"].architecture).state_dict()
    torch.save({"params": {f"module.{key}": value for key, value in state.items()}}, path)
    scorer = Scorer.load("topiq_nr", weights=path, device="cpu", verify=False)
    path.unlink()  # 190 MB; pytest would keep it
    case = GOLDEN["topiq_nr"][0]
    (score,) = scorer.score([frame(case)])
    assert abs(score - case["score"]) <= TOLERANCE


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_checkpoint_with_every_entry_in_its_shape_is_accepted(tmp_path, prefix):
    path = tmp_path / "whole.pth"
    state = empty_state(PUBLISHED["topiq_fr"])
    torch.save({"params": {prefix + key: value for key, value in state.items()}}, path)
    scorer = Scorer.load("topiq_fr", weights=path, device="cpu", verify=False)
    assert not scorer.net.net.score_linear[6].weight.any()


def without_one(state):
    del state["attn_pool.norm2.bias"]


def with_one_more(state):
    state["attn_pool.norm2.bias_too"] = torch.zeros(256)


def with_one_too_short(state):
    state["attn_pool.norm2.bias"] = torch.zeros(255)


@pytest.mark.parametrize("damage", [without_one, with_one_more, with_one_too_short])
def test_a_missing_surplus_or_misshapen_entry_is_refused_by_the_name_of_the_file(tmp_path, damage):
    path = tmp_path / "damaged.pth"
    state = empty_state(PUBLISHED["topiq_fr"])
    damage(state)
    torch.save({"params": state}, path)
    with pytest.raises(WeightsError) as caught:
        Scorer.load("topiq_fr", weights=path, device="cpu", verify=False)
    assert str(path) in str(caught.value)
    assert "attn_pool.norm2.bias" in str(caught.value)
