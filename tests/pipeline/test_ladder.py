import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import ladder, schemas
from pipeline.errors import ConfigError
from pipeline.ladder import Ladder, Rendition
from pipeline.output import Output


def rendition(rate, score, codec="h264"):
    return Rendition(f"{codec}-{rate}", codec, 640, 360, rate, score, None, None)


points = st.lists(
    st.tuples(st.integers(1, 10**6), st.floats(0, 1, width=16)), min_size=1, max_size=20
)


@given(points)
def test_no_rendition_lies_above_the_hull_and_the_hull_rises(found):
    ladder_points = ladder.with_hull([rendition(*p) for p in found])
    assert [r.bit_rate for r in ladder_points] == sorted(r.bit_rate for r in ladder_points)
    hull = [r for r in ladder_points if r.on_hull]
    rates, scores = [r.bit_rate for r in hull], [r.score for r in hull]
    assert rates == sorted(set(rates))
    assert scores == sorted(set(scores))
    assert max(p[1] for p in found) == scores[-1]
    for r in ladder_points:
        assert r.score <= np.interp(r.bit_rate, rates, scores) + 1e-9


@given(points)
def test_each_point_of_the_hull_is_better_than_the_line_around_it(found):
    hull = [r for r in ladder.with_hull([rendition(*p) for p in found]) if r.on_hull]
    for before, at, after in zip(hull, hull[1:], hull[2:], strict=False):
        share = (at.bit_rate - before.bit_rate) / (after.bit_rate - before.bit_rate)
        assert at.score > before.score + share * (after.score - before.score) - 1e-12


def test_half_the_bits_for_the_same_scores_is_a_bd_rate_of_minus_fifty():
    rates, scores = (100, 200, 400, 800, 1600), (0.2, 0.4, 0.55, 0.65, 0.7)
    pairs = list(zip(rates, scores, strict=True))
    both = [rendition(2 * r, s) for r, s in pairs] + [rendition(r, s, "hevc") for r, s in pairs]
    found = Ladder("ref", ladder.with_hull(both))
    assert ladder.bd_rates(found, "h264") == {"hevc": pytest.approx(-50)}
    assert ladder.bd_rates(found, "hevc") == {"h264": pytest.approx(100)}


def test_a_bd_rate_that_cannot_be_told_is_none():
    few = [rendition(r, r / 1000) for r in (100, 200, 300, 400)]
    few += [rendition(r, r / 1000, "hevc") for r in (100, 200, 300)]
    assert ladder.bd_rates(Ladder("ref", few), "h264") == {"hevc": None}
    apart = [rendition(r, 0.1 + r / 10_000) for r in (100, 200, 300, 400)]
    for least in (0.4, 0.029):  # no overlap, and next to none
        other = [rendition(r, least + 0.1 + r / 10_000, "hevc") for r in (100, 200, 300, 400)]
        assert ladder.bd_rates(Ladder("ref", [*apart, *other]), "h264") == {"hevc": None}


def test_an_anchor_that_no_ladder_has_is_an_error_with_those_that_there_are():
    found = [Ladder("ref", [rendition(100, 0.1), rendition(200, 0.3, "hevc")])]
    ladder.require_codec("hevc", found)
    ladder.require_codec(None, found)
    with pytest.raises(ConfigError, match="h265.*h264, hevc"):
        ladder.require_codec("h265", found)


def test_a_rendition_that_is_worse_with_more_bits_is_left_out_of_a_curve():
    curve = [rendition(100, 0.1), rendition(200, 0.3), rendition(300, 0.2), rendition(400, 0.4)]
    assert [r.bit_rate for r in Ladder("ref", curve).of_codec("h264")] == [100, 200, 400]


def test_a_column_of_the_manifest_is_not_taken_for_the_bit_rate(tmp_path):
    schema = schemas.scores((), [pa.field("rate", pa.string())])
    common = dict.fromkeys(("n_frames", "n_units", "n_units_failed", "n_missing"), 1)
    common |= {"partial": False, "model": "m", "kind": "video", "reference_uri": "/ref.mov"}
    rows = [
        {**common, "item_id": uri, "uri": uri, "codec": "h264", "width": 64, "height": 36}
        | {"bit_rate": bits, "score": bits / 1000, "rate": "24 fps"}
        for uri, bits in (("/a.mp4", 400), ("/b.mp4", 100))
    ]
    output = Output(str(tmp_path / "out"))
    with output.parquet_writer(schema, "scores", "m.parquet") as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    _, (found,) = ladder.read(output, None)
    assert [r.bit_rate for r in found.renditions] == [100, 400]
