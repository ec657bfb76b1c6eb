"""Encoding ladders: renditions of each reference by bit rate, and how codecs compare on them."""

import importlib.util
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline import aggregate, schemas
from pipeline.errors import ConfigError, OutputError
from pipeline.output import Output, database

SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("reference_uri", pa.string()),
        ("uri", pa.string()),
        ("codec", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("bit_rate", pa.int64()),
        ("score", pa.float64()),
        ("psnr_y", pa.float64()),
        ("ssim", pa.float64()),
        ("on_hull", pa.bool_()),
    ],
    metadata=schemas.OUTCOME.metadata,
)
"""ladders/: one row per rendition, by reference and bit rate. Sizes are those before scaling."""

# Cubic and finer interpolations of rate over quality need four points (VCEG-M33).
_LEAST_POINTS = 4
# Of the scores that either codec has: a rate over less says little about the rest.
_LEAST_OVERLAP = 0.25


@dataclass(frozen=True)
class Rendition:
    """One point of a ladder. bit_rate: bits per second; on_hull: no mix of others is better."""

    uri: str
    codec: str
    width: int
    height: int
    bit_rate: int
    score: float
    psnr_y: float | None
    ssim: float | None
    on_hull: bool = False


@dataclass(frozen=True)
class Ladder:
    """The renditions of one reference, by bit rate."""

    reference_uri: str
    renditions: list[Rendition]

    def of_codec(self, codec: str) -> list[Rendition]:
        """Those of one codec that score more than every one with fewer bits.

        A curve that falls cannot be turned into bits over quality.
        """
        best, kept = float("-inf"), []
        for rendition in self.renditions:
            if rendition.codec == codec and rendition.score > best:
                best = rendition.score
                kept.append(rendition)
        return kept

    @property
    def codecs(self) -> list[str]:
        """In alphabetical order."""
        return sorted({rendition.codec for rendition in self.renditions})


# A rendition that was not scaled has the size that was scored. The reference is none itself.
# No column of a manifest can be named score_rate, as it could be rate.
_QUERY = """
SELECT model, reference_uri, uri, codec,
       coalesce(split_part(scaled_from, 'x', 1)::INT, width) AS width,
       coalesce(split_part(scaled_from, 'x', 2)::INT, height) AS height,
       coalesce(bit_rate, (8 * size_bytes / duration_s)::BIGINT) AS score_rate,
       score, psnr_y, ssim
FROM scores
WHERE kind = 'video' AND reference_uri IS NOT NULL AND uri <> reference_uri AND score_rate > 0
ORDER BY reference_uri, score_rate, uri
"""


def read(output: Output, model: str | None) -> tuple[str, list[Ladder]]:
    """The ladders among the scores of a model, or of the only one there is, and its name.

    Raises OutputError when there are none, and ConfigError when a model must be chosen.
    """
    connection = database()
    with output.reading("scores"):
        connection.register("scores", aggregate.scores(output, model))
        rows = connection.execute(_QUERY).fetchall()
    if not rows:
        raise OutputError(
            f"{output.url}: no videos were compared with a reference there. See "
            "docs/full-reference.md."
        )
    return str(rows[0][0]), [
        Ladder(reference, with_hull([Rendition(*row[2:]) for row in group]))
        for reference, group in itertools.groupby(rows, key=lambda row: row[1])
    ]


def with_hull(renditions: list[Rendition]) -> list[Rendition]:
    """The same, by bit rate, with `on_hull` set: the upper convex hull of score over bit rate.

    From the cheapest rendition to the best one; a rendition below a line between two others could
    be replaced by switching between those.
    """
    points = sorted(renditions, key=lambda r: (r.bit_rate, -r.score))
    hull: list[Rendition] = []
    for point in points:
        if hull and point.score <= hull[-1].score:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    on = {id(point) for point in hull}
    return [replace(point, on_hull=id(point) in on) for point in points]


def _slope(a: Rendition, b: Rendition) -> float:
    return (b.score - a.score) / (b.bit_rate - a.bit_rate) if b.bit_rate > a.bit_rate else 0.0


def require_codec(anchor: str | None, ladders: list[Ladder]) -> None:
    """Raises ConfigError for a codec that no ladder has."""
    codecs = sorted({codec for ladder in ladders for codec in ladder.codecs})
    if anchor is not None and anchor not in codecs:
        raise ConfigError(
            f"--anchor {anchor}: no rendition is of it. There are {', '.join(codecs)}."
        )


def bd_rates(ladder: Ladder, anchor: str) -> dict[str, float | None]:
    """By codec, its Bjontegaard delta rate against the codec `anchor`, in percent.

    Negative is better: so many bits fewer for the same score (VCEG-M33, with Akima interpolation,
    by the library bjontegaard). None where a ladder has fewer than four rising points, or the
    scores of both hardly overlap.
    """
    base = ladder.of_codec(anchor)
    out: dict[str, float | None] = {}
    for codec in ladder.codecs:
        other = ladder.of_codec(codec)
        if codec == anchor:
            continue
        few = min(len(base), len(other)) < _LEAST_POINTS
        out[codec] = None if few else _bd_rate(base, other)
    return out


def _bd_rate(base: list[Rendition], other: list[Rendition]) -> float | None:
    import bjontegaard

    sides = [([r.bit_rate for r in side], [r.score for r in side]) for side in (base, other)]
    (rates, scores), (other_rates, other_scores) = sides
    overlap = min(max(scores), max(other_scores)) - max(min(scores), min(other_scores))
    union = max(*scores, *other_scores) - min(*scores, *other_scores)
    if overlap < _LEAST_OVERLAP * union or not overlap:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of a small overlap
        return float(
            bjontegaard.bd_rate(
                rates, scores, other_rates, other_scores,
                method="akima", require_matching_points=False, min_overlap=0,
            )
        )  # fmt: skip


def write(output: Output, model: str, ladders: list[Ladder]) -> None:
    """Replace ladders/<model>.parquet."""
    rows = [
        {"model": model, "reference_uri": ladder.reference_uri, **asdict(rendition)}
        for ladder in ladders
        for rendition in ladder.renditions
    ]
    with output.parquet_writer(SCHEMA, "ladders", f"{model}.parquet") as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))


def require_extra() -> None:
    """Raises ConfigError unless what draws and compares ladders is installed."""
    for name in ("bjontegaard", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"{name} is not installed: pip install -e '.[ladder]'.")


def plot(ladder: Ladder, path: Path) -> None:
    """A PNG of score over bit rate: a line for each codec, and the convex hull."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(7, 4.5), dpi=130, layout="constrained")
    axes = figure.subplots()
    for codec in ladder.codecs:
        _line(axes, [r for r in ladder.renditions if r.codec == codec], marker="o", label=codec)
    hull = [r for r in ladder.renditions if r.on_hull]
    _line(axes, hull, color="black", linestyle=":", linewidth=1, label="convex hull")
    axes.set_xscale("log", subs=(2, 5))
    for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis("{x:g}")
    axes.set(xlabel="bit rate, kbit/s", ylabel="score")
    axes.set_title(ladder.reference_uri.rsplit("/", 1)[-1])
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _line(axes: Any, renditions: list[Rendition], **style: Any) -> None:
    axes.plot([r.bit_rate / 1000 for r in renditions], [r.score for r in renditions], **style)


def lines(ladder: Ladder, anchor: str | None) -> Iterator[str]:
    """The ladder as a table for people, and the delta rates against `anchor`."""
    yield ladder.reference_uri
    yield f"  {'kbit/s':>9}  {'score':>7}  {'PSNR-Y':>6}  {'SSIM':>6}  {'size':>9}  hull  rendition"
    for r in ladder.renditions:
        psnr = "" if r.psnr_y is None else f"{r.psnr_y:.2f}"
        ssim = "" if r.ssim is None else f"{r.ssim:.4f}"
        yield (
            f"  {r.bit_rate / 1000:>9.1f}  {r.score:>7.4f}  {psnr:>6}  {ssim:>6}  "
            f"{f'{r.width}x{r.height}':>9}  {'*' if r.on_hull else '':^4}  "
            f"{r.codec}  {r.uri.rsplit('/', 1)[-1]}"
        )
    if len(ladder.codecs) > 1:
        base = anchor or ladder.codecs[0]
        for codec, rate in bd_rates(ladder, base).items():
            shown = "too few points, or none in common" if rate is None else f"{rate:+.1f} %"
            yield f"  BD-rate of {codec} against {base}: {shown}"
