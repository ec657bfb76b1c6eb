"""Weights are found, verified, cached and read; what is not plain weights is refused."""

import dataclasses
import hashlib
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import torch
from golden.parameters import fill
from safetensors.torch import save_file

from topiq_core import cards, weights
from topiq_core.cards import Architecture, Card
from topiq_core.cfanet import CFANet
from topiq_core.errors import CardError, WeightsError
from topiq_core.scorer import Scorer

ARCHITECTURE = Architecture("nr", "mobilenet_v2", inter_dim=32, heads=2, gate_dim=8)
CARD = Card(
    name="mine",
    architecture=ARCHITECTURE,
    filename="mine.safetensors",
    sha256="",
    licence="CC0-1.0",
    trained_on="eight pictures",
    short_side=224,
    score_range=(0.0, 5.0),
    accuracy={"srocc": 0.5},
    recipe={"epochs": 2, "split": [1, 2]},
)


@pytest.fixture(scope="module")
def net():
    return fill(CFANet(ARCHITECTURE))


@pytest.fixture
def some_file(tmp_path):
    path = tmp_path / "some.pth"
    path.write_bytes(b"not what the card says")
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOPIQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def remote():
    """An address in memory that holds b"first"; it is emptied afterwards."""
    store = fsspec.filesystem("memory")
    store.pipe("/topiq-test/remote.pth", b"first")
    yield "memory://topiq-test/remote.pth"
    if store.exists("/topiq-test"):
        store.rm("/topiq-test", recursive=True)


def files_below(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_file_of_another_hash_is_refused_with_what_to_do(some_file):
    digest = hashlib.sha256(some_file.read_bytes()).hexdigest()
    with pytest.raises(WeightsError) as caught:
        weights.resolve("topiq_nr", some_file)
    for said in (str(some_file), digest[:8], "9a73138b", "verify=False", "verify_weights=false"):
        assert said in str(caught.value)


def test_a_file_of_another_hash_is_accepted_without_verification(some_file):
    found = weights.resolve("topiq_nr", some_file, verify=False)
    assert found.card.name == "topiq_nr"
    assert found.path == some_file
    assert found.sha256 == hashlib.sha256(some_file.read_bytes()).hexdigest()


@pytest.mark.parametrize("length", [8, 64])
def test_a_file_is_accepted_when_its_hash_starts_as_the_card_says(some_file, monkeypatch, length):
    digest = hashlib.sha256(some_file.read_bytes()).hexdigest()
    card = dataclasses.replace(cards.PUBLISHED["topiq_nr"], sha256=digest[:length])
    monkeypatch.setitem(cards.PUBLISHED, "topiq_nr", card)
    assert weights.resolve("topiq_nr", some_file).sha256 == digest


def test_an_absent_file_is_named(tmp_path):
    path = tmp_path / "absent.pth"
    with pytest.raises(WeightsError) as caught:
        weights.resolve("topiq_nr", path)
    assert str(path) in str(caught.value)


def test_a_remote_file_is_fetched_once_and_kept_in_the_cache(cache, remote):
    found = weights.resolve("topiq_nr", remote, verify=False)
    assert found.path.is_relative_to(cache)
    assert found.path.name == "remote.pth"
    assert found.path.read_bytes() == b"first"
    fsspec.filesystem("memory").rm("/topiq-test/remote.pth")
    assert weights.resolve("topiq_nr", remote, verify=False) == found
    assert files_below(cache) == [found.path]


def test_a_remote_file_that_was_replaced_is_fetched_anew(cache, remote):
    first = weights.resolve("topiq_nr", remote, verify=False)
    fsspec.filesystem("memory").pipe("/topiq-test/remote.pth", b"second")
    second = weights.resolve("topiq_nr", remote, verify=False)
    assert second.path.read_bytes() == b"second"
    assert second.sha256 != first.sha256
    assert set(files_below(cache)) == {first.path, second.path}


def test_two_addresses_with_one_file_name_do_not_share_a_cached_file(cache, remote):
    fsspec.filesystem("memory").pipe("/topiq-test/other/remote.pth", b"second")
    other = "memory://topiq-test/other/remote.pth"
    paths = [weights.resolve("topiq_nr", at, verify=False).path for at in (remote, other)]
    assert [path.read_bytes() for path in paths] == [b"first", b"second"]
    assert len(files_below(cache)) == 2


def test_an_unreachable_address_is_named_and_leaves_no_file(cache):
    address = "memory://topiq-test/absent.pth"
    with pytest.raises(WeightsError) as caught:
        weights.resolve("topiq_nr", address)
    assert address in str(caught.value)
    assert files_below(cache) == []


class TornFile(io.BytesIO):
    """Gives its first bytes, then fails as a connection does."""

    def read(self, *_):
        if self.tell():
            raise ConnectionResetError("connection reset by peer")
        return super().read(4)


class TornStore(fsspec.AbstractFileSystem):
    """A remote store whose connection breaks in the middle of every file."""

    protocol = "torn"

    def _open(self, *_, **__):
        return TornFile(b"first and last")


def test_a_fetch_that_breaks_off_leaves_no_file(cache):
    fsspec.register_implementation("torn", TornStore, clobber=True)
    with pytest.raises(WeightsError, match=r"torn://store/weights\.pth.*connection reset"):
        weights.resolve("topiq_nr", "torn://store/weights.pth", verify=False)
    assert files_below(cache) == []


def test_a_remote_file_of_another_hash_is_fetched_anew_the_next_time(cache, remote, monkeypatch):
    """A damaged transfer or a corrected upload must not be held against the user for ever."""
    card = cards.PUBLISHED["topiq_nr"]
    good = dataclasses.replace(card, sha256=hashlib.sha256(b"second").hexdigest())
    monkeypatch.setitem(cards.PUBLISHED, "topiq_nr", good)
    with pytest.raises(WeightsError, match="sha256"):
        weights.resolve("topiq_nr", remote)
    fsspec.filesystem("memory").pipe("/topiq-test/remote.pth", b"second")
    found = weights.resolve("topiq_nr", remote)
    assert found.path.read_bytes() == b"second"
    assert files_below(cache) == [found.path]


def test_an_unreachable_hub_says_which_file_to_download_and_how_to_pass_it(tmp_path):
    # huggingface_hub reads its environment when it is imported: hence another process.
    script = (
        "from topiq_core import weights\n"
        "from topiq_core.errors import WeightsError\n"
        "try:\n"
        "    weights.resolve('topiq_nr')\n"
        "except WeightsError as error:\n"
        "    print(error)\n"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**kept, **offline},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    for said in ("topiq_nr", "cfanet_nr_koniq_res50-9a73138b.pth", cards.HUB_REPO, "--weights"):
        assert said in done.stdout
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("name", ["topiq_xx", "absent.safetensors"])
def test_an_unknown_model_is_answered_with_the_known_ones(name):
    with pytest.raises(CardError) as caught:
        weights.resolve(name)
    assert name in str(caught.value)
    for known in (*cards.PUBLISHED, cards.DEFAULT_CARD):
        assert known in str(caught.value)


class Payload:
    """A pickle that makes a folder when it is loaded, as an attack would do worse."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def in_a_checkpoint(payload, path):
    torch.save({"params": {"h_emb": payload}}, path)


def in_an_old_checkpoint(payload, path):
    torch.save({"params": {"h_emb": payload}}, path, _use_new_zipfile_serialization=False)


def in_a_bare_pickle(payload, path):
    path.write_bytes(pickle.dumps({"params": payload}, protocol=2))


def load_into_small_net(path):
    found = weights.resolve("topiq_nr", path, verify=False)
    return weights.load(dataclasses.replace(found, card=CARD))


@pytest.mark.parametrize("write", [in_a_checkpoint, in_an_old_checkpoint, in_a_bare_pickle])
def test_a_pickle_that_runs_code_is_refused_and_its_code_does_not_run(tmp_path, write):
    path, canary = tmp_path / "attack.pth", tmp_path / "canary"
    write(Payload(canary), path)
    with pytest.raises(WeightsError) as caught:
        load_into_small_net(path)
    assert str(path) in str(caught.value)
    assert not canary.exists()
    # The payload is a live one: an unguarded unpickling runs it.
    if write is in_a_bare_pickle:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert canary.exists()


@pytest.mark.parametrize("name", ["page.pth", "page.safetensors", "page"])
@pytest.mark.parametrize("text", ["<html>404</html>\n", ""])
def test_a_text_file_is_refused_by_name(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(WeightsError) as caught:
        load_into_small_net(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content", [[torch.zeros(2)], {"params": [1, 2]}, {"params": {"h_emb": 1.5}}, torch.zeros(2)]
)
def test_a_file_of_something_else_than_named_tensors_is_refused(tmp_path, content):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(WeightsError, match="state dict"):
        load_into_small_net(path)


def test_a_saved_network_comes_back_with_its_card_and_its_weights_in_fp16(tmp_path, net):
    path = tmp_path / "made" / "mine.safetensors"
    weights.save(net, CARD, path)
    found = weights.resolve(path)
    assert found.card == CARD
    assert found.path == path
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    loaded = weights.load(found)
    assert not loaded.training
    before, after = net.state_dict(), loaded.state_dict()
    assert list(before) == list(after)
    for key, value in before.items():
        stored = value.half().float() if value.is_floating_point() else value
        assert after[key].dtype == value.dtype
        assert torch.equal(after[key], stored), key
    assert list(path.parent.iterdir()) == [path]


def test_a_saved_network_replaces_the_one_before_it(tmp_path, net):
    path = tmp_path / "mine.safetensors"
    weights.save(net, dataclasses.replace(CARD, name="before"), path)
    weights.save(net, CARD, path)
    assert cards.read_embedded(path) == CARD
    assert list(tmp_path.iterdir()) == [path]


def test_a_save_that_fails_keeps_the_file_before_it(tmp_path, net):
    path = tmp_path / "mine.safetensors"
    weights.save(net, CARD, path)
    unwritable = dataclasses.replace(CARD, recipe={"optimiser": object()})
    with pytest.raises(TypeError):
        weights.save(net, unwritable, path)
    assert cards.read_embedded(path) == CARD
    assert list(tmp_path.iterdir()) == [path]


def test_a_saved_network_is_scored_by_the_path_of_its_file(tmp_path, net):
    path = tmp_path / "mine.safetensors"
    weights.save(net, CARD, path)
    for model in (path, str(path)):
        scorer = Scorer.load(model, device="cpu")
        assert scorer.card == CARD
        assert scorer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_safetensors_file_without_a_card_is_refused_as_a_model(tmp_path, net):
    path = tmp_path / "bare.safetensors"
    save_file(net.state_dict(), path, metadata={"format": "pt"})
    with pytest.raises(WeightsError) as caught:
        weights.resolve(path)
    assert str(path) in str(caught.value)
    assert "--model" in str(caught.value)
    assert "--weights" in str(caught.value)


def test_a_safetensors_file_without_a_card_serves_as_the_weights_of_a_named_one(tmp_path, net):
    path = tmp_path / "bare.safetensors"
    save_file(net.state_dict(), path)
    loaded = load_into_small_net(path)
    assert torch.equal(loaded.h_emb, net.h_emb)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        CARD.to_json().replace('"heads"', '"heds"'),
        CARD.to_json().replace('"licence"', '"license"'),
    ],
)
def test_an_unreadable_card_is_a_weights_error(tmp_path, text):
    path = tmp_path / "mine.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={cards.METADATA_KEY: text})
    with pytest.raises(WeightsError, match="card"):
        weights.resolve(path)


@pytest.mark.parametrize("change", [{"backbone": "swin"}, {"heads": 5}])
def test_a_card_of_a_network_that_cannot_be_built_is_a_weights_error(tmp_path, net, change):
    path = tmp_path / "mine.safetensors"
    card = dataclasses.replace(CARD, architecture=dataclasses.replace(ARCHITECTURE, **change))
    weights.save(net, card, path)
    with pytest.raises(WeightsError):
        weights.load(weights.resolve(path))


def test_the_cache_is_the_users_own_unless_it_is_named(monkeypatch):
    monkeypatch.delenv("TOPIQ_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert weights.cache_dir() == Path("/somewhere/topiq")
    monkeypatch.setenv("TOPIQ_CACHE", "~/elsewhere")
    assert weights.cache_dir() == Path.home() / "elsewhere"
