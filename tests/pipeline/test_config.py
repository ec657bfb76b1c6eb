import shlex
from pathlib import Path

import pytest

from pipeline.config import Config, load, reference
from pipeline.errors import ConfigError
from pipeline.plan import fingerprint
from topiq_core.weights import resolve


def test_flags_win_over_settings_and_settings_over_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("sample: all\nunit_frames: 7\nmax_pixels: 1000\n")
    config = load(file, ["unit_frames=8", "max_pixels=2000"], {"max_pixels": 3000, "model": None})
    assert (config.sample, config.unit_frames, config.max_pixels) == ("all", 8, 3000)
    assert config.model == Config().model


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("unit_frames=0", "unit_frames"),
        ("unit_frames=many", "unit_frames"),
        ("colour=red", "colour"),
        ("sample=fps:0", "fps:0"),
        ("pooling=[mean,median]", "median"),
        ("alpha=grey", "alpha"),
        ("hdr=clip", "hdr"),
        ("model", "KEY=VALUE"),
    ],
)
def test_a_wrong_option_is_refused_by_name(setting, named):
    with pytest.raises(ConfigError, match=named):
        load(settings=[setting])


@pytest.mark.parametrize("text", ["- a list", "sample: [", ""])
def test_a_wrong_file_is_refused_by_name(tmp_path, text):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="broken.yaml"):
        load(file)


@pytest.mark.parametrize("option", ["hdr=refuse", "interlaced=keep", "crop=auto", "alpha=white"])
def test_an_option_that_changes_pixels_makes_scores_other_scores(option):
    weights = resolve(Config().model)
    assert fingerprint(load(settings=[option]), weights) != fingerprint(Config(), weights)
    assert fingerprint(load(settings=["attempts=1"]), weights) == fingerprint(Config(), weights)


def test_the_reference_page_is_made_from_the_options():
    page = Path(__file__).parents[2] / "docs/configuration.md"
    assert page.read_text() == reference(), "run `make docs`"


def test_a_replay_is_read_back_as_it_was_meant():
    config = load(settings=["reference_root=/m/été 🎬", "sample=fps:2"])
    *_, root, sample = shlex.split(config.replay("/c/a.mp4"))
    settings = [setting.removeprefix("--set=") for setting in (root, sample)]
    assert load(settings=settings) == config


def test_an_option_that_an_earlier_version_had_does_not_stop_a_retry():
    recorded = Config(sample="all").model_dump(mode="json") | {"units_per_batch": 8}
    assert load(recorded=recorded) == Config(sample="all")
    with pytest.raises(ConfigError, match="units_per_batch"):
        load(settings=["units_per_batch=8"], recorded=recorded)
