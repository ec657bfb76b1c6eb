"""A run: plan -> score -> aggregate on one output folder, and the record of it in run.json."""

import importlib.metadata
import json
import platform
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import av
import ray

from pipeline import (
    aggregate,
    catalog,
    cluster,
    commits,
    lease,
    plan,
    schemas,
    score,
    score_pairs,
    stages,
    storage,
)
from pipeline.config import Config, load, parsed
from pipeline.errors import (
    BY_CODE,
    ConfigError,
    LostUnits,
    OutputError,
    ScorersDied,
    TooManyFailures,
)
from pipeline.monitor import Monitor
from pipeline.output import Output
from pipeline.stages import Bottleneck
from pipeline.storage import redacted
from topiq_core import weights as weights_file
from topiq_core.weights import Weights

Event = Callable[..., None]
"""Called as event(name, **fields) when something has happened; docs/events.md lists them."""

_POLL_S = 1.0


@dataclass(frozen=True)
class Summary:
    """What a run did. Counts of items are of the whole plan; frames_scored of this run alone."""

    run_id: str
    output: str
    model: str
    items: int
    scored: int
    partial: int
    failed: int
    failed_by_code: dict[str, int]
    skipped: int
    duplicates: int
    frames: int
    frames_scored: int
    seconds: float
    frames_per_s: float | None
    bottleneck: Bottleneck | None
    advice: str | None


@dataclass(frozen=True)
class _Run:
    """What every step of a run needs to know."""

    run_id: str
    source: str
    found: catalog.Catalog
    output: Output
    config: Config
    weights: list[Weights]
    event: Event

    @property
    def model(self) -> str:
        """The first model: the plan is made for it, and the others follow."""
        return self.weights[0].card.name

    @property
    def models(self) -> list[str]:
        """All models, by name."""
        return [weights.card.name for weights in self.weights]

    @property
    def compares(self) -> bool:
        """Whether items are compared with references."""
        return self.weights[0].card.architecture.mode == "fr"


def score_catalog(source: str, out: str, config: Config, event: Event) -> Summary:
    """Score a catalog into an output folder. Raises TopiqError; MediaErrors become rows."""
    run = _open(source, out, config, event)
    with lease.held(run.output, run.run_id):
        return _run_steps(run)


def _run_steps(run: _Run) -> Summary:
    started = time.monotonic()
    event = run.event
    record = _new_record(run)
    _write_record(run.output, record)
    try:
        with run.output.reading():
            summary = _scored(run, record, started)
    except lease.Lost:
        raise  # run.json is the other run's now
    except BaseException as error:
        record |= {"status": "failed", "error": redacted(f"{type(error).__name__}: {error}")}
        record["finished_at"] = _now()
        with suppress(OutputError):  # the first error is the one to show
            _write_record(run.output, record)
        raise
    record |= {"status": "finished", "summary": asdict(summary), "finished_at": _now()}
    _write_record(run.output, record)
    event("finished", **asdict(summary))
    return summary


def _scored(run: _Run, record: dict[str, Any], started: float) -> Summary:
    """Plan, score and aggregate. What is found out goes into the record."""
    cluster.connect(run.config)
    with cluster.beside_driver(Monitor) as monitor:
        seconds, planned = _timed(lambda: _plan(run, cluster.shares(run.config), monitor))
        # Frames are brought to the size of references, which the plan does not have.
        largest = None if run.compares else planned.largest_pixels
        shares = cluster.shares(run.config, largest, planned.units)
        record["cluster"] = asdict(shares)
        record["plan"] = asdict(planned) | {"seconds": seconds}
        run.event("planned", **record["plan"])
        for uri, code, message in aggregate.planning_failures(run.output, run.model):
            run.event("item_failed", uri=uri, code=code, message=message)
        score_seconds = _score(run, shares, planned, monitor)
    try:
        counts, *_ = (aggregate.run(run.output, model, run.config.pooling) for model in run.models)
    except LostUnits:
        commits.reopen_lost(run.output, run.model)
        raise
    card = run.weights[0].card
    found = stages.of_run(run.output, run.run_id, card, shares, score_seconds)
    record["stages"] = {"decode": asdict(found.decode), "score": asdict(found.score)}
    held_up = stages.verdict(found, shares)
    return Summary(
        run_id=run.run_id,
        output=run.output.url,
        model=",".join(run.models),
        items=counts.items,
        scored=counts.scored,
        partial=counts.partial,
        failed=counts.failed,
        failed_by_code=dict(counts.failed_by_code.most_common()),
        skipped=planned.skipped,
        duplicates=planned.duplicates,
        frames=counts.frames,
        frames_scored=found.frames,
        seconds=round(time.monotonic() - started, 2),
        frames_per_s=round(found.frames / score_seconds, 2) if found.frames else None,
        bottleneck=held_up[0] if held_up else None,
        advice=held_up[1] if held_up else None,
    )


def plan_catalog(
    source: str, out: str, config: Config, event: Event
) -> tuple[plan.PlanCounts, tuple[int, int]]:
    """Write plan/ only. Raises TopiqError.

    Returns what was counted, and the frames and pixels that are not scored yet.
    """
    run = _open(source, out, config, event)
    with lease.held(run.output, run.run_id):
        if run.output.read_text("run.json") is None:
            record = {"status": "planned", "schema_version": schemas.SCHEMA_VERSION}
            _write_record(run.output, record)
        cluster.connect(run.config)
        with cluster.beside_driver(Monitor) as monitor, run.output.reading():
            planned = _plan(run, cluster.shares(run.config), monitor)
            left = commits.open_work(run.output, run.model)
    event("planned", **asdict(planned))
    return planned, left


def retry(
    out: str,
    codes: Collection[str],
    event: Event,
    source: str | None = None,
    settings: list[str] | None = None,
) -> Summary:
    """Score an output's failed units again, as its last run did. Raises TopiqError.

    codes: the failure codes to try again; empty means all of them. source: the catalog, if the
    one in run.json will not do, because it is signed for a time that is over. settings: options
    as `KEY=VALUE` in place of the recorded ones.
    """
    output = Output(out)
    record = _last_record(output) or {}
    if "source" not in record:
        raise OutputError(f"{output.url}: no run in it to go on with. Run `topiq score` first.")
    source = source or record["source"]
    config = load(settings=settings, recorded=record["config"])
    lost = sorted(set(record.get("options_redacted", ())) - set(parsed(settings)))
    if lost:
        raise ConfigError(
            f"{lost[0]} {record['config'][lost[0]]}: its credentials were not kept. Give it again "
            f"with --set {lost[0]}=..."
        )
    if source == record["source"] and record.get("source_redacted", "=REDACTED" in source):
        raise ConfigError(f"{source}: its credentials were not kept. Give it again with --source.")
    unknown = sorted(set(codes) - set(BY_CODE))
    if unknown:
        raise ConfigError(f"no such failure code: {unknown[0]}. There are {', '.join(BY_CODE)}.")
    run = _open(source, out, config, event)
    with lease.held(output, run.run_id):
        with output.reading():
            reopened = commits.reopen(output, run.model, codes or BY_CODE)
        event("reopened", units=reopened)
        return _run_steps(run)


def _last_record(output: Output) -> dict[str, Any] | None:
    """run.json, or where that is damaged the newest of runs/. None when nothing was ever run.

    Raises OutputError when none of them can be read.
    """
    text = output.read_text("run.json")
    if text is None:
        return None
    if found := _parsed(text):
        return found
    for path in reversed(output.files("*.json", "runs")):
        if found := _parsed(output.read_text("runs", path.rpartition("/")[2]) or ""):
            return found
    raise OutputError(
        f"{output.url}/run.json is damaged, and there is no copy of it in runs/. Name another "
        "folder."
    )


def _parsed(text: str) -> dict[str, Any] | None:
    """A record, or None when it is damaged."""
    with suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, dict) and "schema_version" in found:
            return found
    return None


def _open(source: str, out: str, config: Config, event: Event) -> _Run:
    """Everything that can go wrong before Ray is needed goes wrong here."""
    source = storage.absolute(source)
    config = _with_absolute_paths(config)
    config, weights = _resolved_models(config)
    if weights[0].card.architecture.mode == "fr":
        found = catalog.read_pairs(source, config.references)
    elif config.references.given or config.measures or config.align != Config().align:
        raise ConfigError(
            f"{config.model} takes no reference, nothing to align and nothing to measure against: "
            "choose a model that compares."
        )
    else:
        found = catalog.read(source)
    output = Output(out)
    output.create()
    _refuse_foreign(output)
    run_id = datetime.now(UTC).strftime("%Y%m%dT%H%M%S-") + uuid.uuid4().hex[:6]
    event(
        "run_started",
        run_id=run_id,
        source=redacted(source),
        output=output.url,
        found=len(found.table),
    )
    return _Run(run_id, source, found, output, config, weights, event)


def _resolved_models(config: Config) -> tuple[Config, list[Weights]]:
    """The models' weights, one that compares first, as the plan is made for it."""
    found = [
        (name, place, weights_file.resolve(name, place, config.verify_weights))
        for name, place in config.models
    ]
    found.sort(key=lambda model: model[2].card.architecture.mode != "fr")
    names = [weights.card.name for *_, weights in found]
    if len(set(names)) != len(names):
        raise ConfigError(f"model '{config.model}': two of them are called the same.")
    changes = {"model": ",".join(name for name, *_ in found)}
    if config.weights is not None:
        changes["weights"] = ",".join(place or "" for _, place, _ in found)
    return config.model_copy(update=changes), [weights for *_, weights in found]


def _plan(run: _Run, shares: cluster.Shares, monitor: Any) -> plan.PlanCounts:
    return plan.run(run.found, run.output, run.config, run.weights, shares, run.run_id, monitor)


def _score(run: _Run, shares: cluster.Shares, planned: plan.PlanCounts, monitor: Any) -> float:
    """Score what is open. Returns the seconds that it took; 0 when nothing was."""
    allowed = run.config.failures_allowed
    if allowed is not None and planned.failed_items > allowed:
        raise TooManyFailures(
            f"{planned.failed_items} items failed at planning, {allowed} are allowed. "
            f"See {run.output.url}/failures/."
        )
    commits.recover(run.output)
    to_do = commits.count_open(run.output, run.model)
    if not to_do:
        return 0.0
    if allowed is not None:
        ray.get(monitor.allow.remote(allowed - planned.failed_items))
    with _watched(monitor, to_do, run.event):
        seconds, _ = _timed(lambda: _score_open(run, shares, to_do, monitor))
    commits.recover(run.output)
    if ray.get(monitor.stopped.remote()):
        raise TooManyFailures(
            f"more work units failed than the {allowed} that are allowed: the run was stopped. "
            f"See {run.output.url}/failures/; the same command goes on with the rest."
        )
    return seconds


def _score_open(run: _Run, shares: cluster.Shares, to_do: int, monitor: Any) -> None:
    """Score all that is open. Goes on after a loss of scorers, as long as anything got done."""
    plan_path = run.output.inside(*plan.table_path(run.model))
    graph = score_pairs.LADDERS if run.compares else score.UNITS
    while True:
        try:
            return score.run(
                graph,
                plan_path,
                to_do,
                _addresses(run.found),
                run.output,
                run.config,
                run.weights,
                shares,
                monitor,
                run.run_id,
            )
        except ScorersDied:
            # Write tasks that were under way may end after this: see the end of `_score`.
            commits.recover(run.output)
            still_open = commits.count_open(run.output, run.model)
            if still_open >= to_do:
                raise
            run.event("scorers_lost", units_open=still_open)
            to_do = still_open


def _addresses(found: catalog.Catalog) -> dict[str, str]:
    """By item_id, the addresses that are more than the URI in the tables, as with credentials.

    Those of references by the item_id of their URI. They are handed to the workers in memory and
    written nowhere.
    """
    columns = {name: found.table[name].to_pylist() for name in catalog.COLUMNS.names[:5]}
    items = zip(columns["item_id"], columns["uri"], columns["address"], strict=True)
    references = zip(columns["reference_uri"], columns["reference_address"], strict=True)
    named = [*items, *((catalog.item_id(uri), uri, place) for uri, place in references if uri)]
    read = ((name, uri, catalog.from_bytes(place)) for name, uri, place in named)
    return {name: place for name, uri, place in read if uri != place}


@contextmanager
def _watched(monitor: Any, to_do: int, event: Event) -> Iterator[None]:
    """Report progress from a thread while the body runs, and once more at its end."""
    done = threading.Event()

    def report() -> None:
        progress = ray.get(monitor.poll.remote())
        for uri, code, message in progress.recent_failures:
            event("item_failed", uri=uri, code=code, message=message)
        event(
            "progress",
            units_done=progress.units,
            units_planned=to_do,
            frames=progress.frames,
            failed=progress.n_failed,
        )

    def watch() -> None:
        with suppress(ray.exceptions.RayError):
            while not done.wait(_POLL_S):
                report()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with suppress(ray.exceptions.RayError):  # the error of the body is the one to show
            report()


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.monotonic()
    result = work()
    return round(time.monotonic() - started, 3), result


def _with_absolute_paths(config: Config) -> Config:
    """Workers have another current folder: paths in the options must not depend on it."""
    changes = {}
    names, places = zip(*config.models, strict=True)
    changes["model"] = ",".join(
        str(Path(name).absolute()) if Path(name).suffix == ".safetensors" else name
        for name in names
    )
    if config.weights is not None:
        changes["weights"] = ",".join(
            str(Path(place).expanduser().absolute())
            if place and "://" not in place
            else place or ""
            for place in places
        )
    for name in ("reference", "reference_root"):
        if value := getattr(config, name):
            changes[name] = storage.absolute(value)
    return config.model_copy(update=changes)


def _refuse_foreign(output: Output) -> None:
    """Do not mix into a folder that holds something else, or tables of another schema."""
    record = _last_record(output)
    if record is None:
        strange = sorted(n for n in output.names() if not n.startswith(".") and n != lease.FILE)
        if strange:
            raise OutputError(
                f"{output.url}: not empty and not an output of ours (it holds {strange[0]}). "
                "Name a new or empty folder."
            )
        return
    version = record["schema_version"]
    if version != schemas.SCHEMA_VERSION:
        raise OutputError(
            f"{output.url}: written with schema {version}, this is {schemas.SCHEMA_VERSION}. "
            "Name another folder."
        )


def _new_record(run: _Run) -> dict[str, Any]:
    options = run.config.model_dump(mode="json")
    shown = {k: redacted(v) if isinstance(v, str) else v for k, v in options.items()}
    return {
        "run_id": run.run_id,
        "status": "running",
        "started_at": _now(),
        "source": redacted(run.source),
        "source_redacted": redacted(run.source) != run.source,
        "schema_version": schemas.SCHEMA_VERSION,
        "versions": _versions(),
        "config": shown,
        "options_redacted": [name for name in options if shown[name] != options[name]],
        "weights": _weights_record(run.weights[0]),
        "companions": [_weights_record(weights) for weights in run.weights[1:]],
    }


def _weights_record(weights: Weights) -> dict[str, Any]:
    card = weights.card
    rmse = card.calibration.rmse if card.calibration else None
    return {
        "model": card.name,
        "sha256": weights.sha256,
        "licence": card.licence,
        aggregate.MODEL_ERROR: rmse,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    names = ("topiq", "ray", "torch", "av", "pyarrow", "pillow", "duckdb")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    codec = av.library_versions["libavcodec"]
    return found | {"libavcodec": ".".join(map(str, codec))}


def _write_record(output: Output, record: dict[str, Any]) -> None:
    """As run.json, the latest run's, and under runs/ for good: rows name the run they are of."""
    text = json.dumps(record, indent=2) + "\n"
    output.write_text(text, "run.json")
    if "run_id" in record:
        output.write_text(text, "runs", f"{record['run_id']}.json")
