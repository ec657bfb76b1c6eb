"""How well scores agree with people.

    rated items --> OUT/ratings.parquet         a manifest: uri, reference_uri, type, split, mos
       |  score     as any catalog: pipeline.run, into OUT/run/
       v
    plan/ + scores/ + failures/ of OUT/run/
       |  compare   one process: a join, then topiq_core.metrics
       v
    OUT/evaluation.json, evaluation.md, scatter.png

Items that failed are listed, and are in no number. The same command again scores only what is
new or changed, and computes the rest anew.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from pipeline import datasets, plan, run, scatter, schemas
from pipeline.config import Config
from pipeline.datasets import Rated
from pipeline.errors import CatalogError, ConfigError, OutputError, RunError
from pipeline.output import Output, database
from pipeline.run import Event
from pipeline.storage import join, redacted
from topiq_core import metrics

Array = npt.NDArray[np.float64]

MEASURES = ("srocc", "krocc", "plcc", "rmse")
FEWEST = 5
CONFIDENCE = 0.95
SEED = 0

_RATINGS, _RUN, _SCATTER = "ratings.parquet", "run", "scatter.png"

# The first unit of each planned item, which carries the columns of the manifest, and its fate.
_QUERY = """
SELECT p.uri, p.mos, p.type, s.score, coalesce(s.partial, false) AS partial, f.code, f.message
FROM plan p
LEFT JOIN scores s USING (item_id)
LEFT JOIN (
    SELECT item_id, code, message FROM failures WHERE model = $model
    QUALIFY row_number() OVER (PARTITION BY item_id ORDER BY finished_at DESC) = 1
) f USING (item_id)
WHERE p.unit_index = 0
ORDER BY p.uri, p.item_id
"""


@dataclass(frozen=True)
class Measure:
    """An estimate and its confidence interval; None where it is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Group:
    """Agreement on the items of one type, or on all of them. `n`: how many."""

    n: int
    srocc: Measure
    krocc: Measure
    plcc: Measure
    rmse: Measure


@dataclass(frozen=True)
class Failed:
    """A rated item that is in no number, and why."""

    uri: str
    code: str
    message: str


@dataclass(frozen=True)
class Evaluation:
    """What evaluation.json holds; docs/accuracy.md explains every field."""

    ratings: str
    layout: str | None
    split: str | None
    mos_range: tuple[float, float] | None
    inverted: bool
    model: str
    weights_sha256: str
    run_id: str
    n_rated: int
    n_scored: int
    n_partial: int
    n_failed: int
    confidence: float
    resamples: int
    seed: int
    curve: tuple[float, ...]
    overall: Group
    by_type: dict[str, Group]
    failed: list[Failed]
    scatter: str | None


def evaluate(
    source: str,
    out: str,
    config: Config,
    event: Event,
    layout: str | None = None,
    split: str | None = None,
    resamples: int = 1000,
) -> Evaluation:
    """Score what people rated, compare, and write the report into `out`. Raises TopiqError.

    source: a CSV, or a folder of that `layout`. split: COLUMN=VALUE, the items to use.
    resamples: of the bootstrap; 0 for no intervals.
    """
    if len(config.models) != 1:
        raise ConfigError(f"model '{config.model}': one model at a time is evaluated.")
    rated = datasets.read(source, layout)
    items = datasets.select(rated.items, split) if split else rated.items
    if len(items) < FEWEST:
        raise CatalogError(f"{source}: {len(items)} rated items; {FEWEST} or more are needed.")
    output = Output(out)
    summary = _score(items, output, config, event)
    inside = Output(join(output.url, _RUN))
    rows = _outcomes(inside, summary.model)
    scored = [row for row in rows if row["score"] is not None]
    if len(scored) < FEWEST:
        raise RunError(
            f"{len(scored)} of {len(rows)} rated items are scored; {FEWEST} or more are needed. "
            f"{inside.url}/failures/ says what is wrong."
        )
    scores = np.array([row["score"] for row in scored], dtype=np.float64)
    ratings = np.array([row["mos"] for row in scored], dtype=np.float64)
    curve = metrics.fit_curve(scores, ratings)
    evaluation = Evaluation(
        ratings=redacted(source),
        layout=layout,
        split=split,
        mos_range=rated.mos_range,
        inverted=rated.inverted,
        model=summary.model,
        weights_sha256=_weights_sha256(inside),
        run_id=summary.run_id,
        n_rated=len(rows),
        n_scored=len(scored),
        n_partial=sum(row["partial"] for row in scored),
        n_failed=len(rows) - len(scored),
        confidence=CONFIDENCE,
        resamples=resamples,
        seed=SEED,
        curve=curve.parameters,
        overall=_group(scores, ratings, resamples),
        by_type=_by_type([row["type"] for row in scored], scores, ratings, resamples),
        failed=[
            Failed(row["uri"], row["code"] or "lost", row["message"] or "")
            for row in rows
            if row["score"] is None
        ],
        scatter=_SCATTER if scatter.available() else None,
    )
    if evaluation.scatter:
        with output.publish(_SCATTER) as path:
            scatter.draw(path, scores, ratings, curve, evaluation.model)
    output.write_text(markdown(evaluation), "evaluation.md")
    output.write_text(json.dumps(asdict(evaluation), indent=2) + "\n", "evaluation.json")
    event("evaluated", **_event(evaluation, output))
    return evaluation


def markdown(evaluation: Evaluation) -> str:
    """The report for people."""
    e = evaluation
    chosen = f", {e.split}" if e.split else ""
    scale = f" on a scale of {e.mos_range[0]:g} to {e.mos_range[1]:g}" if e.mos_range else ""
    brackets = (
        f"In brackets: {e.confidence:.0%} intervals, {e.resamples} bootstrap resamples. "
        if e.resamples
        else ""
    )
    turned = "; published as differences, turned round" if e.inverted else ""
    lines = [
        f"# {e.model} on {e.layout or e.ratings}{chosen}",
        "",
        f"{e.n_rated} rated items, {e.n_scored} scored ({e.n_partial} of them partial), "
        f"{e.n_failed} failed and left out. Ratings{scale}: higher is better{turned}.",
        "",
        f"Weights {e.weights_sha256}. Ratings from {e.ratings}. Run {e.run_id}.",
        "",
        f"{brackets}PLCC and RMSE are taken after the four-parameter logistic fit; RMSE is in the "
        "unit of the ratings.",
        "",
        *table(e),
    ]
    if e.scatter:
        lines += ["", f"![Scores against ratings]({e.scatter})"]
    if e.failed:
        lines += ["", "## Failed items", "", "| item | code | message |", "|---|---|---|"]
        lines += [f"| {_cell(f.uri)} | `{f.code}` | {_cell(f.message)} |" for f in e.failed]
    return "\n".join(lines) + "\n"


def table(evaluation: Evaluation) -> list[str]:
    """The measures as the lines of a Markdown table."""
    header = ["items", "n", *(name.upper() for name in MEASURES)]
    rows = [("all", evaluation.overall), *evaluation.by_type.items()]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, group in rows:
        cells = [_cell(name), str(group.n), *(_shown(getattr(group, m)) for m in MEASURES)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _score(items: Iterable[Rated], output: Output, config: Config, event: Event) -> run.Summary:
    output.create()
    names = [name for name in output.names() if not name.startswith(".")]
    if names and _RATINGS not in names:
        raise OutputError(
            f"{output.url}: not empty and not an evaluation (it holds {sorted(names)[0]}). Name a "
            "new or empty folder."
        )
    with output.publish(_RATINGS) as path:
        pq.write_table(datasets.manifest(list(items)), path, compression="zstd")
    return run.score_catalog(join(output.url, _RATINGS), join(output.url, _RUN), config, event)


def _outcomes(output: Output, model: str) -> list[dict[str, Any]]:
    """One row per planned item: uri, mos, type, score (null when it failed), code, message."""
    connection = database()
    fs = output.arrow_filesystem()
    tables = {"plan": plan.table_path(model), "scores": ("scores", f"{model}.parquet")}
    for name, place in tables.items():
        connection.register(name, pads.dataset(output.inside(*place), filesystem=fs))
    failures = output.dataset(output.parquet_files("failures"), schemas.OUTCOME)
    connection.register("failures", failures)
    found = connection.execute(_QUERY, {"model": model}).to_arrow_table()
    rows: list[dict[str, Any]] = found.to_pylist()
    return rows


def _weights_sha256(output: Output) -> str:
    record = json.loads(output.read_text("run.json") or "{}")
    return str(record["weights"]["sha256"])


def _by_type(
    types: list[str | None], scores: Array, ratings: Array, resamples: int
) -> dict[str, Group]:
    """One group for each type, by name; none when no item has a type."""
    groups = {}
    for name in sorted({t for t in types if t is not None}):
        chosen = np.array([t == name for t in types])
        groups[name] = _group(scores[chosen], ratings[chosen], resamples)
    return groups


def _group(scores: Array, ratings: Array, resamples: int) -> Group:
    if len(scores) < FEWEST:
        return Group(len(scores), *[Measure(None)] * len(MEASURES))
    found = metrics.agreement(scores, ratings)
    ends = metrics.bounds(scores, ratings, CONFIDENCE, resamples, SEED) if resamples else ()
    measures = [
        Measure(_defined(getattr(found, name)), *(_defined(getattr(end, name)) for end in ends))
        for name in MEASURES
    ]
    return Group(len(scores), *measures)


def _defined(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _shown(measure: Measure) -> str:
    if measure.value is None:
        return "undefined"
    if measure.low is None or measure.high is None:
        return f"{measure.value:.4f}"
    return f"{measure.value:.4f} ({measure.low:.4f} to {measure.high:.4f})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _event(evaluation: Evaluation, output: Output) -> dict[str, Any]:
    names = ("model", "n_rated", "n_scored", "n_failed", "scatter")
    overall = asdict(evaluation.overall)
    return {
        "output": output.url,
        **{name: getattr(evaluation, name) for name in names},
        **{name: overall[name] for name in MEASURES},
    }
