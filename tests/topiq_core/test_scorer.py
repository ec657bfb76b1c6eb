"""What `Scorer` promises about the frames it takes and the scores it returns."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from golden.parameters import fill, noisy, picture
from PIL import Image

from topiq_core.cards import Architecture, Calibration, Card
from topiq_core.cfanet import CFANet
from topiq_core.convolution import HAS_AMX
from topiq_core.errors import CardError, FrameError, WeightsError
from topiq_core.scorer import Scorer, _halving_on_oom, resized

SIZES = [(64, 64), (48, 80), (64, 64), (80, 48), (64, 64), (48, 80), (33, 32)]
FRAMES = [picture(seed, *size) for seed, size in enumerate(SIZES)]
STACK = np.stack([picture(seed, 64, 48) for seed in range(4)])


class InBatches(Scorer):
    """Takes several frames at once on a CPU too, as a GPU does."""

    def _batch_size(self, h, w):
        return min(5, self.batch_pixels // (h * w))


def small(mode="nr", short_side=None, kind=Scorer):
    """A small scorer, its parameters filled from their names: every frame has its own score."""
    architecture = Architecture(mode, "mobilenet_v2", inter_dim=32, heads=2, gate_dim=8)
    card = Card(f"small_{mode}", architecture, "", "", "", "", short_side=short_side)
    return kind(fill(CFANet(architecture)), card, torch.device("cpu"))


@pytest.fixture(scope="module")
def scorer():
    return small()


@pytest.fixture(scope="module")
def pair_scorer():
    return small("fr")


@pytest.fixture(scope="module")
def alone(scorer):
    """The score of each of FRAMES when nothing else is scored with it."""
    scores = np.concatenate([scorer.score([frame]) for frame in FRAMES])
    assert len(set(scores.tolist())) == len(FRAMES)
    return scores


def test_a_score_does_not_depend_on_the_other_frames(scorer, alone):
    assert np.array_equal(scorer.score(FRAMES), alone)
    assert np.array_equal(scorer.score(FRAMES[2:5]), alone[2:5])
    assert np.array_equal(scorer.score([FRAMES[1]] * 3), alone[[1, 1, 1]])


def test_scores_of_mixed_sizes_come_back_in_the_order_given(scorer, alone):
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(FRAMES))
        assert np.array_equal(scorer.score([FRAMES[i] for i in order]), alone[order])


def test_batched_scores_are_the_single_ones_in_the_order_given(alone):
    scores = small(kind=InBatches).score(FRAMES)
    assert np.abs(scores - alone).max() <= 2e-5


def test_scores_are_float32_one_for_each_frame(scorer):
    scores = scorer.score(STACK)
    assert scores.dtype == np.float32
    assert scores.shape == (4,)
    assert np.isfinite(scores).all()


def test_numpy_and_torch_stacks_and_lists_score_the_same(scorer):
    expected = scorer.score(STACK)
    for frames in (torch.from_numpy(STACK), list(STACK), list(torch.from_numpy(STACK))):
        assert np.array_equal(scorer.score(frames), expected)


def test_read_only_frames_are_scored_unchanged_and_without_a_warning(scorer):
    frames = STACK.copy()
    frames.setflags(write=False)
    torch.set_warn_always(True)  # torch would warn of read-only memory once per process only
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            scores = scorer.score(frames)
    finally:
        torch.set_warn_always(False)
    assert [str(w.message) for w in warned] == []
    assert np.array_equal(scores, scorer.score(STACK))
    assert np.array_equal(frames, STACK)


def test_views_with_strides_of_any_sign_are_scored_as_their_contents(scorer):
    views = [STACK[:, ::-1], STACK[:, :, ::-1], STACK[..., ::-1], STACK.transpose(0, 2, 1, 3)]
    for view in views:
        assert np.array_equal(scorer.score(view), scorer.score(view.copy()))


def test_pairs_of_mixed_sizes_come_back_in_the_order_given(pair_scorer):
    distorted = [noisy(frame, seed) for seed, frame in enumerate(FRAMES)]
    pairs = zip(distorted, FRAMES, strict=True)
    single = np.concatenate([pair_scorer.score_pairs([d], [r]) for d, r in pairs])
    assert len(set(single.tolist())) == len(FRAMES)
    assert np.array_equal(pair_scorer.score_pairs(distorted, FRAMES), single)
    turned = pair_scorer.score_pairs(FRAMES, distorted)
    assert not np.isclose(turned, single, rtol=0, atol=1e-4).all()


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (np.zeros((64, 64, 3), np.float32), "float32"),
        (np.zeros((64, 64, 3), np.uint16), "uint16"),
        (np.zeros((64, 64, 3), bool), "bool"),
        (torch.zeros((64, 64, 3)), "float32"),
        (np.zeros((64, 64, 4), np.uint8), "64, 64, 4"),
        (np.zeros((64, 64, 1), np.uint8), "64, 64, 1"),
        (np.zeros((3, 64, 64), np.uint8), "3, 64, 64"),
        (np.zeros((64, 64), np.uint8), "64, 64"),
        (np.zeros((31, 64, 3), np.uint8), "64x31"),
        (np.zeros((64, 31, 3), np.uint8), "31x64"),
        (np.zeros((0, 64, 3), np.uint8), "64x0"),
    ],
)
@pytest.mark.parametrize("writeable", [True, False])
def test_a_frame_that_is_not_uint8_rgb_of_32_pixels_is_named(scorer, frame, said, writeable):
    if isinstance(frame, np.ndarray):
        frame.setflags(write=writeable)
    with pytest.raises(FrameError) as caught:
        scorer.score([FRAMES[0], frame])
    assert "frame 1" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("kind", [object, ">u2"])
def test_an_array_that_torch_has_no_type_for_is_a_frame_error(scorer, kind):
    with pytest.raises(FrameError, match="frame 0"):
        scorer.score([np.zeros((64, 64, 3), kind)])


def test_a_frame_that_was_not_put_in_a_list_is_refused(scorer):
    with pytest.raises(FrameError):
        scorer.score(FRAMES[0])


def test_frames_of_32_pixels_are_enough(scorer):
    assert np.isfinite(scorer.score([picture(0, 32, 32)])).all()


def test_unequal_numbers_of_distorted_and_reference_frames_are_refused(pair_scorer):
    with pytest.raises(FrameError, match="2 distorted frames, 1 reference"):
        pair_scorer.score_pairs([FRAMES[0], FRAMES[2]], [FRAMES[0]])


def test_a_pair_of_two_sizes_is_refused_by_its_position_and_sizes(pair_scorer):
    with pytest.raises(FrameError, match="pair 1: distorted is 80x48, reference is 48x80"):
        pair_scorer.score_pairs([FRAMES[0], FRAMES[1]], [FRAMES[0], FRAMES[3]])


def test_a_no_reference_model_refuses_pairs_and_says_what_to_call(scorer):
    with pytest.raises(CardError, match=r"small_nr .* score\(\)"):
        scorer.score_pairs([FRAMES[0]], [FRAMES[0]])


def test_a_full_reference_model_refuses_single_frames_and_says_what_to_call(pair_scorer):
    with pytest.raises(CardError, match=r"small_fr .* score_pairs\(\)"):
        pair_scorer.score([FRAMES[0]])


def test_an_unknown_precision_is_refused_by_name():
    with pytest.raises(CardError, match="int3"):
        Scorer.load(precision="int3")


def test_no_frames_give_no_scores(scorer, pair_scorer):
    nothing = np.empty((0, 64, 64, 3), np.uint8)
    results = (scorer.score([]), scorer.score(nothing), pair_scorer.score_pairs(nothing, []))
    for scores in results:
        assert scores.dtype == np.float32
        assert scores.shape == (0,)


@pytest.mark.parametrize(
    ("height", "width", "side", "expected"),
    [
        (1080, 1920, 384, (384, 682)),
        (1920, 1080, 384, (682, 384)),
        (97, 131, 384, (384, 518)),
        (500, 500, 384, (384, 384)),
        (384, 512, 384, (384, 512)),
    ],
)
def test_the_shorter_side_becomes_the_cards_and_the_longer_one_is_truncated(
    height, width, side, expected
):
    assert resized(height, width, side) == expected


def test_a_larger_frame_is_averaged_down_to_the_cards_size_as_pillow_does_it():
    """The golden pictures are all enlarged, which shows no difference without antialiasing."""
    scorer = small(short_side=64)
    frame = picture(7, 150, 233)
    channels = [Image.fromarray(frame[..., c].astype(np.float32)) for c in range(3)]
    shrunk = [np.asarray(c.resize((99, 64), Image.Resampling.BILINEAR)) for c in channels]
    with torch.inference_mode():
        expected = scorer.net(torch.from_numpy(np.stack(shrunk))[None] / 255)
    # The two round their filters differently, by 1e-6; an untrained network amplifies it tenfold.
    assert float(scorer.score([frame])[0]) == pytest.approx(float(expected), abs=5e-5)


@pytest.mark.parametrize("short_side", [None, 64])
@pytest.mark.parametrize("size", [(40, 700), (700, 40)])
def test_thin_images_are_scored(size, short_side):
    scores = small(short_side=short_side).score([picture(1, *size), picture(2, *size)])
    assert np.isfinite(scores).all()
    assert scores[0] != scores[1]


def test_thin_pairs_are_scored(pair_scorer):
    reference = picture(1, 40, 700)
    scores = pair_scorer.score_pairs([noisy(reference, 1), reference], [reference, reference])
    assert np.isfinite(scores).all()
    assert scores[0] != scores[1]


# As PyTorch, cuDNN (which tries every engine it has) and cuBLAS say it.
NO_MEMORY = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


def out_of_memory_above(limit, sizes, error=NO_MEMORY[0]):
    """Negates its items; raises for more than `limit` of them as CUDA does. Notes every call."""

    def run(part):
        sizes.append(len(part))
        if len(part) > limit:
            raise error
        return torch.tensor([-item for item in part], dtype=torch.float32)

    return run


@pytest.mark.parametrize("error", NO_MEMORY, ids=["torch", "cudnn", "cublas"])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8])
def test_a_batch_too_large_for_memory_is_halved_until_it_fits_and_keeps_its_order(count, error):
    sizes = []
    batch = list(range(10, 10 + count))
    scores = _halving_on_oom(out_of_memory_above(2, sizes, error), batch)
    assert torch.cat(scores).tolist() == [-item for item in batch]
    assert sizes[0] == count
    assert sum(size for size in sizes if size <= 2) == count


def test_a_single_frame_that_does_not_fit_in_memory_raises():
    sizes = []
    with pytest.raises(torch.cuda.OutOfMemoryError):
        _halving_on_oom(out_of_memory_above(0, sizes), [1, 2, 3, 4])
    assert sizes == [4, 2, 1]


def test_other_errors_of_a_batch_are_not_retried():
    sizes = []

    def run(part):
        sizes.append(len(part))
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        _halving_on_oom(run, [1, 2, 3, 4])
    assert sizes == [4]


def test_a_network_out_of_memory_still_scores_every_frame_in_order(alone):
    scorer = small(kind=InBatches)
    sizes = []

    def refuse_more_than_one(_, inputs):
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    scorer.net.register_forward_pre_hook(refuse_more_than_one)
    assert np.array_equal(scorer.score(FRAMES), alone)
    assert max(sizes) > 1


def test_a_size_that_did_not_fit_in_memory_is_not_tried_again():
    scorer = small(kind=InBatches)
    sizes = []

    def refuse_more_than_two(_, inputs):
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    scorer.net.register_forward_pre_hook(refuse_more_than_two)
    scorer.score([FRAMES[0]] * 9)
    assert sizes == [5, 2, 3, 1, 2, 2, 2]


def test_memory_that_was_short_for_a_time_is_tried_again_little_by_little():
    scorer = small(kind=InBatches)
    scorer.batch_pixels = 2 * 64 * 64
    sizes = []
    scorer.net.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    scorer.score([FRAMES[0]] * 40)
    assert sizes[0] == 2
    assert max(sizes) == 5
    assert sizes[:-1] == sorted(sizes[:-1])


def test_batches_are_of_what_the_network_sees():
    frames = [FRAMES[0]] * 4
    sizes = []
    for side in (None, 128):
        scorer = small(short_side=side)
        scorer.batch_pixels = 4 * 64 * 64
        sizes.append(scorer._pixels(*frames[0].shape[:2]))
    assert sizes == [64 * 64, 128 * 128]


@pytest.mark.parametrize("asked", ["high", "medium"])
def test_a_process_that_asked_for_less_than_fp32_gets_the_same_scores(scorer, alone, asked):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(asked)
    try:
        assert np.array_equal(scorer.score(FRAMES), alone)
        assert torch.get_float32_matmul_precision() == asked
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.fixture
def newer_settings():
    """Gives back what tests change in the newer settings of PyTorch's arithmetic."""
    kinds = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul
    before = [kind.fp32_precision for kind in kinds]
    yield kinds
    for kind, precision in zip(kinds, before, strict=True):
        kind.fp32_precision = precision


@pytest.mark.parametrize("way", ["default", "older", "newer"])
def test_pytorchs_two_settings_of_arithmetic_never_contradict_while_scoring(
    scorer, alone, newer_settings, way
):
    """On a GPU PyTorch refuses to compute while they do; asking for them tells without one."""
    older = torch.get_float32_matmul_precision()
    if way == "older":
        torch.set_float32_matmul_precision("high")
    if way == "newer":
        newer_settings[0].fp32_precision = "tf32"
    asked = [kind.fp32_precision for kind in newer_settings]
    seen = []

    def look(*_):
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))

    hook = scorer.net.register_forward_hook(look)
    try:
        assert np.array_equal(scorer.score(FRAMES[:1]), alone[:1])
        assert [kind.fp32_precision for kind in newer_settings] == asked
    finally:
        hook.remove()
        torch.set_float32_matmul_precision(older)
    assert seen == [(False, False)]


def test_a_gpu_that_is_not_there_is_a_card_error():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(CardError, match="no GPU that PyTorch can use"):
        Scorer.load(device="cuda")


def test_renditions_score_as_their_pairs_do(pair_scorer):
    renditions = [noisy(FRAMES[0], seed) for seed in range(3)]
    expected = pair_scorer.score_pairs(renditions, [FRAMES[0]] * 3)
    assert len(set(expected.tolist())) == 3
    assert np.array_equal(pair_scorer.score_renditions(renditions, FRAMES[0]), expected)
    batched = small("fr", kind=InBatches).score_renditions(renditions, FRAMES[0])
    assert np.abs(batched - expected).max() <= 2e-5


def test_a_reference_is_looked_at_once_for_all_its_renditions(pair_scorer):
    seen = []
    hook = pair_scorer.net.stages[0].register_forward_pre_hook(lambda *_: seen.append(1))
    pair_scorer.score_renditions([FRAMES[0]] * 4, FRAMES[2])
    hook.remove()
    assert len(seen) == 5


def test_renditions_of_another_size_are_refused_by_their_position(pair_scorer):
    with pytest.raises(FrameError, match="pair 1: distorted is 80x48, reference is 64x64"):
        pair_scorer.score_renditions([FRAMES[0], FRAMES[1]], FRAMES[0])


def test_no_renditions_give_no_scores(pair_scorer):
    assert pair_scorer.score_renditions([], FRAMES[0]).shape == (0,)


def test_fp16_is_refused_on_a_cpu():
    with pytest.raises(CardError, match="'fp16' is for GPUs: on a CPU take"):
        Scorer.load(device="cpu", precision="fp16")


@pytest.mark.parametrize(("precision", "missing"), [("bf16", "AMX"), ("int8", "VNNI")])
def test_a_precision_is_refused_on_a_cpu_without_its_instructions(monkeypatch, precision, missing):
    monkeypatch.setattr(f"topiq_core.scorer.HAS_{missing}", False)
    with pytest.raises(CardError, match=f"'{precision}' needs .*{missing}.* take fp32"):
        Scorer.load(device="cpu", precision=precision)


def test_8_bits_are_refused_where_a_reference_is_compared_with():
    with pytest.raises(CardError, match="'int8' is for no-reference models.*cfanet_lite_fr"):
        Scorer.load("cfanet_lite_fr", device="cpu", precision="int8")


@pytest.mark.skipif(not HAS_AMX, reason="this CPU has no AMX")
@pytest.mark.parametrize("model", ["cfanet_lite_nr", "cfanet_lite_fr"])
def test_bf16_on_a_cpu_scores_as_fp32_but_for_rounding(model):
    exact, ours = (Scorer.load(model, device="cpu", precision=p) for p in ("fp32", "bf16"))
    others = [noisy(frame, 1) for frame in FRAMES]
    scored = [
        s.score(FRAMES) if model.endswith("nr") else s.score_pairs(others, FRAMES)
        for s in (exact, ours)
    ]
    assert not np.array_equal(*scored)
    np.testing.assert_allclose(*scored, atol=0.03)


@pytest.mark.parametrize("mode", ["nr", "fr"])
def test_a_calibrated_card_maps_outputs_onto_its_scale_in_the_same_order(mode):
    plain, curve = small(mode), Calibration(0.2, 0.5, "0 is bad, 1 excellent", 100)
    card = dataclasses.replace(plain.card, calibration=curve)
    ours = Scorer(fill(CFANet(card.architecture)), card, torch.device("cpu"))
    scored = [
        s.score(FRAMES) if mode == "nr" else s.score_pairs(FRAMES, FRAMES) for s in (plain, ours)
    ]
    outputs, scores = scored
    assert scores.dtype == np.float32
    assert ((scores > 0) & (scores < 1)).all()
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-(outputs - 0.2) / 0.5)), rtol=1e-5)
    assert (np.argsort(scores) == np.argsort(outputs)).all()


def test_a_card_gives_its_calibration_back_and_refuses_one_that_falls():
    curve = Calibration(0.2, 0.5, "0 is bad, 1 excellent", 100)
    card = dataclasses.replace(small().card, calibration=curve)
    assert Card.from_json(card.to_json()) == card
    falling = dataclasses.replace(card, calibration=dataclasses.replace(curve, width=-0.5))
    with pytest.raises(WeightsError, match="rise"):
        Card.from_json(falling.to_json())
