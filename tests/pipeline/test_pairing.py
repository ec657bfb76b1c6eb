import random

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import catalog
from pipeline.errors import ConfigError
from pipeline.pairing import Pairing, References, pair_by_key, path_key, pattern_key

names = st.text("abcXYZ019._- é", min_size=1, max_size=8).map(lambda s: f"n{s}n")
paths = st.lists(names, min_size=1, max_size=3).map("/".join)
suffixes = st.sampled_from([".mp4", ".mkv", ".MOV"])


@given(keys=st.sets(paths, min_size=1, max_size=20), data=st.data())
def test_the_same_path_below_both_roots_pairs_in_any_order_and_with_gaps(keys, data):
    kept = {key for key in keys if data.draw(st.booleans())}
    references = [f"s3://m/ref/{key}{data.draw(suffixes)}" for key in kept]
    distorted = [f"/out/{key}{data.draw(suffixes)}" for key in keys]
    data.draw(st.randoms()).shuffle(references)
    pairs = pair_by_key(distorted, references, path_key("/out"), path_key("s3://m/ref/"))
    assert [p.distorted for p in pairs] == distorted
    for pair, key in zip(pairs, keys, strict=True):
        if key in kept:
            assert pair.reference.rpartition(".")[0] == f"s3://m/ref/{key}"
            assert pair.problem is None
        else:
            assert pair == Pairing(
                pair.distorted,
                None,
                f"no reference has its key '{key}'; with pair_pattern, choose another key.",
            )


@given(titles=st.sets(st.integers(0, 999), min_size=1, max_size=15), seed=st.integers(0, 9))
def test_a_pattern_gathers_the_renditions_of_a_title(titles, seed):
    heights = (1080, 720, 360)
    distorted = [f"/out/title{t}_{h}p.mp4" for t in titles for h in heights]
    masters = [f"/masters/title{t}_master.mov" for t in titles]
    random.Random(seed).shuffle(distorted)
    by_pattern = References(root="/masters", pattern=r"(?P<key>title\d+)_")
    for pair in by_pattern.pair(distorted, masters, "/out"):
        title = pair.distorted.removeprefix("/out/").rpartition("_")[0]
        assert pair.reference == f"/masters/{title}_master.mov"


@pytest.mark.parametrize(
    ("source", "reference"),
    [
        ("out [x]", "show/a.mov"),
        ("out [x]/list.csv", "show/a.mov"),
        ("out [x]/show", "a.mov"),
        ("out [x]/show/a.mp4", "a.mov"),
        ("o*/show/a.mp4", "out [x]/show/a.mov"),
    ],
)
def test_paths_count_from_the_folder_that_a_source_names(tmp_path, source, reference):
    for name in ("out [x]/show/a.mp4", f"ref/{reference}", "ref/other.mov"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "out [x]/list.csv").write_text("uri\nshow/a.mp4\n")
    found = catalog.read_pairs(str(tmp_path / source), References(root=str(tmp_path / "ref")))
    pairs = dict(zip(*(found.table[c].to_pylist() for c in ("uri", "reference_uri")), strict=True))
    item = str(tmp_path / "out [x]/show/a.mp4")
    assert pairs[item] == str(tmp_path / "ref" / reference)


@pytest.mark.parametrize("source", ["x/out", "x/out/", "x/out/*", "x/out/s*/a.mp4", "x/o*/show"])
def test_paths_count_from_a_root_whose_listing_is_written_otherwise(source):
    """Listings say memory:///folder for memory://folder, as they say s3:// for s3a://."""
    fs = fsspec.filesystem("memory")
    for name in ("/x/out/show/a.mp4", "/masters/show/a.mov", "/masters/out/show/a.mov"):
        fs.pipe(name, b"x")
    found = catalog.read_pairs(f"memory://{source}", References(root="memory://masters/"))
    folder = "/masters/out/show" if "o*" in source else "/masters/show"
    assert found.table["reference_uri"].to_pylist() == [f"memory://{folder}/a.mov"]


def test_options_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match="not both"):
        References(file="a", root="b")
    with pytest.raises(ConfigError, match="reference-root"):
        References(pattern="(?P<key>a)")


def test_two_references_with_one_key_leave_the_item_unpaired_and_are_named():
    references = ["/ref/a.mov", "/ref/b.mov", "/ref/a.mp4"]
    ambiguous, plain = pair_by_key(
        ["/out/a.mkv", "/out/b.mkv"], references, path_key("/out"), path_key("/ref")
    )
    assert ambiguous.reference is None
    assert ambiguous.problem == "2 references have its key 'a': /ref/a.mov, /ref/a.mp4."
    assert plain == Pairing("/out/b.mkv", "/ref/b.mov")


def test_a_reference_that_is_listed_twice_is_one():
    twice = ["/ref/a.mov", "/ref/a.mov"]
    (pair,) = pair_by_key(["/out/a.mkv"], twice, path_key("/out"), path_key("/ref"))
    assert pair.reference == "/ref/a.mov"


@pytest.mark.parametrize("uri", ["/elsewhere/a.mp4", "/outer/a.mp4", "/out", "/out/"])
def test_what_does_not_lie_below_the_root_has_no_key(uri):
    (pair,) = pair_by_key([uri], ["/ref/a.mov"], path_key("/out"), path_key("/ref"))
    assert pair.reference is None
    assert "no key" in pair.problem


def test_only_the_last_suffix_is_left_out_of_a_key():
    assert path_key("/out")("/out/show.s01.e02.mp4") == "show.s01.e02"
    assert path_key("/out")("/out/v1.0/clip") == "v1.0/clip"


def test_an_empty_key_pairs_with_nothing():
    key = pattern_key(r"(?P<key>\d*)_")
    (pair,) = pair_by_key(["/out/_a.mp4"], ["/ref/_b.mp4"], key, key)
    assert pair.reference is None


@pytest.mark.parametrize("pattern", ["(?P<key>", r"\d+", r"(?P<name>\d+)"])
def test_a_pattern_without_a_group_named_key_is_refused(pattern):
    with pytest.raises(ConfigError, match="pattern"):
        pattern_key(pattern)
