"""The model that comes with the package: usable offline, small, licensed, and good enough."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from jobs.sample_media import landscape
from topiq_core import cards
from topiq_core.scorer import Scorer

PATH = cards.BUNDLED_DIR / f"{cards.DEFAULT_CARD}.safetensors"

# An audit hook cannot be undone: hence another process. It sees every socket of the interpreter.
OFFLINE = """
import socket, sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        raise RuntimeError("network: " + event)

sys.addaudithook(refuse)
try:
    socket.create_connection(("127.0.0.1", 9))
except RuntimeError:
    print("blocked")

import numpy as np
from topiq_core import Scorer

scorer = Scorer.load(device="cpu")
frames = np.random.default_rng(1).integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
print(scorer.card.name, *scorer.score(frames))
"""


@pytest.fixture(scope="module")
def card():
    return cards.read_embedded(PATH)


def test_the_default_model_scores_without_network_or_cache(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        env={**os.environ, "TOPIQ_CACHE": str(tmp_path), "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    blocked, scored = done.stdout.splitlines()
    assert blocked == "blocked"
    name, *scores = scored.split()
    assert name == cards.DEFAULT_CARD
    assert all(-0.5 < float(score) < 1.5 for score in scores)
    assert len(set(scores)) == 2
    assert list(tmp_path.iterdir()) == []


def test_the_default_model_is_smaller_than_20_megabytes():
    assert 1_000_000 < PATH.stat().st_size < 20_000_000


def test_the_default_model_goes_by_the_name_of_its_file(card):
    assert card.name == cards.DEFAULT_CARD
    assert card.filename == PATH.name
    assert cards.DEFAULT_CARD in cards.names()
    assert card.architecture.mode == "nr"


def test_the_default_model_says_its_licence_and_what_it_was_trained_on(card):
    # A licence and a data set have names, which are not this short.
    assert len(card.licence) >= 5
    assert len(card.trained_on) >= 5


def test_the_default_model_agrees_with_people_as_well_as_promised(card):
    assert {"srocc", "plcc"} <= set(card.accuracy)
    assert 0.76 <= card.accuracy["srocc"] <= 1
    assert 0.76 <= card.accuracy["plcc"] <= 1


def test_the_notice_of_the_photos_owners_comes_with_the_default_model():
    notice = PATH.with_name(f"{cards.DEFAULT_CARD}.COPYRIGHT.txt")
    assert "University of Texas at Austin" in notice.read_text()


FR_PATH = cards.BUNDLED_DIR / "cfanet_lite_fr.safetensors"


@pytest.fixture(scope="module")
def compare():
    return Scorer.load("cfanet_lite_fr", device="cpu")


def test_the_bundled_model_that_compares_is_small_and_says_where_it_comes_from(compare):
    card = compare.card
    assert 1_000_000 < FR_PATH.stat().st_size < 20_000_000
    assert (card.name, card.architecture.mode) == ("cfanet_lite_fr", "fr")
    assert "LIVE In the Wild" in card.trained_on
    assert {"srocc", "plcc"} <= set(card.accuracy)
    notice = FR_PATH.with_name("cfanet_lite_fr.COPYRIGHT.txt")
    assert "University of Texas at Austin" in notice.read_text()


@pytest.mark.parametrize("kind", ["jpeg", "blur", "noise", "small"])
def test_the_bundled_model_that_compares_orders_degrees_of_a_distortion(compare, kind):
    """On a picture that the test makes: the reference first, then every degree in its place."""
    picture = landscape(256, 384, seed=11)
    rng = np.random.Generator(np.random.PCG64(1))

    def worse(degree):
        image = Image.fromarray(picture)
        if kind == "jpeg":
            packed = io.BytesIO()
            image.save(packed, "jpeg", quality=(60, 25, 5)[degree])
            return np.asarray(Image.open(packed))
        if kind == "blur":
            return ndimage.gaussian_filter(picture, sigma=(0.8, 2, 5)[degree], axes=(0, 1))
        if kind == "noise":
            noisy = picture + rng.normal(0, (6, 20, 60)[degree], picture.shape)
            return np.clip(noisy, 0, 255).astype(np.uint8)
        factor = (1.5, 3, 8)[degree]
        small = image.resize((int(384 / factor), int(256 / factor)), Image.Resampling.BICUBIC)
        return np.asarray(small.resize((384, 256), Image.Resampling.BICUBIC))

    ladder = [picture, *(worse(degree) for degree in range(3))]
    scores = list(compare.score_renditions(ladder, picture))
    assert scores == sorted(scores, reverse=True)
    assert scores[0] - scores[-1] > 0.3
