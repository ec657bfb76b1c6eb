"""score: work units to frame scores, streaming, committed as they are done.

    plan/                one row per work unit
       |  decode   CPU task pool,   1 unit -> 1 row: its frames, or why there are none
       v
    rows of frames       schemas.DECODED, in the object store, at most unit_bytes each
       |  score    actor pool (GPU when there is one), 1 row -> 1 row without the frames
       v
    frame_scores/ and failures/    schemas.OUTCOME; Ray Data's checkpoint on unit_id is the commit

A unit is done when its row is committed, in either folder; the same command then leaves it out.
Rows are independent: no shuffle, no barrier, and what a unit's row holds depends on it alone.
Units that share a reference pass through `score_pairs` instead, with the same ends.
"""

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy
from ray.data.checkpoint import CheckpointConfig
from ray.data.exceptions import ExecutionTimeoutError

from pipeline import cluster, commits, schemas
from pipeline.config import Config
from pipeline.errors import (
    DecodeError,
    InternalError,
    MediaError,
    OutOfMemory,
    RunError,
    TooSmall,
)
from pipeline.lookup import Lookup
from pipeline.media import guard
from pipeline.media.guard import Frames
from pipeline.monitor import Pulse
from pipeline.output import Output
from pipeline.plan import companion_id
from pipeline.storage import redacted
from pipeline.transient import persistently
from topiq_core.errors import FrameError, TopiqError
from topiq_core.weights import Weights

if TYPE_CHECKING:
    from topiq_core.scorer import Scorer

# The folder that a row is written to, as a partition column of Ray Data's writer.
_FOLDER = "folder"


@dataclass(frozen=True)
class Graph:
    """The stages between plan/ and the written rows.

    columns: of the plan. gather: from the rows of a block to rows that are each decoded as one;
    None when they are that already. decode: a generator function, called with the rows of a block
    and the arguments of `decode_units`. score: an actor class, constructed as `ScoreUnits` is.
    most_units: how many units a gathered row may hold.
    """

    columns: tuple[str, ...]
    gather: Callable[[pa.Table], pa.Table] | None
    decode: Callable[..., Iterator[pa.Table]]
    score: "type[ScoreUnits]"
    most_units: int = 1


def run(
    graph: Graph,
    plan_path: str,
    n_units: int,
    addresses: Mapping[str, str],
    output: Output,
    config: Config,
    weights: Sequence[Weights],
    shares: cluster.Shares,
    monitor: Any,
    run_id: str,
) -> None:
    """Score every planned unit that is not committed yet. Raises RunError.

    weights: of the models, in the order of the options' names; the plan is that of the first.

    addresses: where to read items, by item_id, whose URI in the plan had credentials taken out.
    """
    context = DataContext.get_current()
    before = context.checkpoint_config
    context.checkpoint_config = _checkpoint(output)
    rows = max(1, min(config.units_per_commit, n_units // (4 * shares.decode_tasks)))
    try:
        with cluster.ended_when_stuck(config.no_progress_timeout_s, monitor):
            units = ray.data.read_parquet(
                plan_path,
                filesystem=output.arrow_filesystem(),
                columns=list(graph.columns),
                num_cpus=shares.light_cpus,
                override_num_blocks=min(_MOST_READ, -(-n_units // rows)),
            )
            if graph.gather is not None:
                units = units.map_batches(
                    graph.gather,
                    batch_size=None,
                    batch_format="pyarrow",
                    num_cpus=shares.light_cpus,
                    ray_remote_args_fn=cluster.bounded_retries,
                )
            units = units.repartition(target_num_rows_per_block=max(1, rows // graph.most_units))
            outcomes = units.map_batches(
                graph.decode,
                fn_args=(
                    config,
                    run_id,
                    Lookup(addresses),
                    Lookup(commits.earlier_attempts(output, weights[0].card.name)),
                    monitor,
                ),
                batch_size=None,
                batch_format="pyarrow",
                compute=TaskPoolStrategy(size=shares.decode_tasks),
                num_cpus=shares.decode_cpus,
                ray_remote_args_fn=cluster.bounded_retries,
            ).map_batches_internal(  # `map_batches`, which wants a batch_size for GPUs
                graph.score,
                fn_constructor_args=(config, weights, shares, monitor),
                batch_size=None,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(size=shares.score_actors),
                ray_remote_args_fn=cluster.bounded_actor_retries,
                **_actor_resources(shares),
            )
            outcomes.write_parquet(
                output.path,
                filesystem=output.arrow_filesystem(),
                partition_cols=[_FOLDER],
                partitioning_flavor=None,
                mode="append",
                schema=_written_schema(),
                ray_remote_args={"num_cpus": shares.light_cpus},
                concurrency=shares.write_tasks,
            )
    except (ray.exceptions.RayError, ExecutionTimeoutError) as error:
        raise cluster.run_error(error) from error
    finally:
        context.checkpoint_config = before


# Blocks that a plan is read as: as many as there will be of it, or Ray's own number for large ones.
# Of more, `repartition` would not make fewer again.
_MOST_READ = 200

PLAN_COLUMNS = (
    "unit_id", "item_id", "uri", "kind", "model", "unit_index", "times_s", "weights_s", "crop",
    "code", "reference_uri",
)  # fmt: skip


def _checkpoint(output: Output) -> CheckpointConfig:
    checkpoint = CheckpointConfig(
        id_column="unit_id",
        checkpoint_path=output.inside(commits.FOLDER),
        delete_checkpoint_on_success=False,
        override_filesystem=output.arrow_filesystem(),
    )
    checkpoint.checkpoint_actor_pool_max_size = 1
    checkpoint.checkpoint_actor_memory_bytes = 128 << 20
    return checkpoint


def _actor_resources(shares: cluster.Shares) -> dict[str, Any]:
    if shares.actor_gpus:
        return {"num_gpus": shares.actor_gpus, "num_cpus": shares.actor_cpus}
    return {"num_cpus": shares.actor_cpus, "runtime_env": cluster.for_cpu_scorers()}


def _written_schema() -> pa.Schema:
    return pa.schema(
        [*schemas.OUTCOME, pa.field(_FOLDER, pa.string())], metadata=schemas.OUTCOME.metadata
    )


# --- decode stage -------------------------------------------------------------------------------


def decode_units(
    units: pa.Table,
    config: Config,
    run_id: str,
    addresses: Lookup,
    earlier: Lookup,
    monitor: Any,
) -> Iterator[pa.Table]:
    """One row of frames, or of failure, for each planned unit.

    addresses: as for `run`; earlier: how often a unit was tried by earlier runs, by unit_id;
    monitor: hears of each unit, None when nobody listens.
    """
    if stopped(config, monitor):
        return
    pulse = Pulse(monitor)
    waiting: list[tuple[dict[str, Any], Frames]] = []
    for unit in units.to_pylist():
        if unit["code"] is not None:  # failed at planning, and is on record
            continue
        unit["address"] = addresses.get(unit["item_id"], unit["uri"])
        waiting.append(_decode_unit(unit, config, run_id, earlier.get(unit["unit_id"], 0)))
        pulse.beat()
        if sum(len(found.pixels) for _, found in waiting) >= _TOGETHER_BYTES:
            yield with_frames(waiting)
            waiting = []
    if waiting:
        yield with_frames(waiting)


def stopped(config: Config, monitor: Any) -> bool:
    """Whether more units have failed than are allowed: what is not begun yet stays open then.

    Stages let all that is left pass by: an error would take finished rows along.
    """
    return config.failures_allowed is not None and bool(ray.get(monitor.stopped.remote()))


# Small units go on together: a table of 40 columns for each costs Ray more than decoding a small
# picture does. Larger ones go on at once, and their pixels are not copied.
_TOGETHER_BYTES = 4 << 20


def _decode_unit(
    unit: dict[str, Any], config: Config, run_id: str, attempts_before: int
) -> tuple[dict[str, Any], Frames]:
    started = time.perf_counter()
    row = begun(unit, run_id, attempts_before)
    found = _NOTHING

    def attempt() -> Frames:
        row["attempt"] += 1
        return _decode(unit, config)

    try:
        found = persistently(attempt, config.attempts)
        row |= {
            "partial": found.problem is not None,
            "message": found.problem,
            "n_missing": found.missing,
            "pts_s": found.pts_s,
            "weight_s": found.weight_s,
            "frame": form(found),
            "wait_s": found.wait_s,
        }
    except Exception as error:
        row |= failure("decode", error, unit, config, compares=False) | {"pts_s": unit["times_s"]}
    row["decode_s"] = time.perf_counter() - started
    return row, found


_NOTHING = Frames([], [], [], [], b"")


def begun(unit: dict[str, Any], run_id: str, attempts_before: int) -> dict[str, Any]:
    """The columns of a unit's row that are known before anything is done."""
    same = ("unit_id", "item_id", "uri", "kind", "model", "unit_index", "reference_uri")
    return {
        **{name: unit[name] for name in same},
        "attempt": attempts_before,
        "partial": False,
        "n_missing": 0,
        "host": socket.gethostname(),
        "run_id": run_id,
        "started_at": datetime.now(UTC),
    }


def _decode(unit: dict[str, Any], config: Config) -> Frames:
    decoder = guard.shared(config.decode_memory_bytes)
    address, timeout = unit["address"], config.decode_timeout_s
    if unit["kind"] == "image":
        found = decoder.decode_image(address, config.max_pixels, config.alpha, timeout)
        return replace(found, weight_s=unit["weights_s"])
    found = decoder.decode_video(
        address, unit["times_s"], unit["weights_s"],
        config.max_pixels, 2 * config.unit_bytes, timeout, config.policy, unit["crop"],
    )  # fmt: skip
    refuse_partial(found, address, config)
    return found


def refuse_partial(found: Frames, address: str, config: Config) -> None:
    """Raises DecodeError when the material is not whole and the options want it so."""
    if found.problem and config.on_partial == "fail":
        raise DecodeError(f"{address}: only a part can be decoded ({found.problem}).")


def form(found: Frames) -> dict[str, Any]:
    """What the first frame was and how it became RGB."""
    look = asdict(found.look) if found.look else {}
    width, height = found.widths[0], found.heights[0]
    scaled_from = None if found.unscaled == f"{width}x{height}" else found.unscaled
    return {"width": width, "height": height, **look, "scaled_from": scaled_from}


def with_frames(rows: Sequence[tuple[dict[str, Any], Frames]]) -> pa.Table:
    """A table of rows and their frames. Pixels of a single row are those that the decoder wrote."""
    widths = [found.widths for _, found in rows]
    heights = [found.heights for _, found in rows]
    sizes = [
        3 * h * w
        for hs, ws in zip(heights, widths, strict=True)
        for h, w in zip(hs, ws, strict=True)
    ]
    ends = np.cumsum([0, *sizes], dtype=np.int64)
    parts = [found.pixels for _, found in rows]
    pixels = parts[0] if len(parts) == 1 else b"".join(parts)
    blobs = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(sizes), [None, pa.py_buffer(ends), pa.py_buffer(pixels)]
    )
    firsts = np.cumsum([0, *(len(w) for w in widths)], dtype=np.int32)
    lists = {
        "frames": pa.ListArray.from_arrays(pa.array(firsts), blobs),
        "widths": pa.array(widths, pa.list_(pa.int32())),
        "heights": pa.array(heights, pa.list_(pa.int32())),
    }
    table = pa.Table.from_pylist([row for row, _ in rows], schema=_DECODED_ROW)
    for name, column in lists.items():
        table = table.append_column(schemas.DECODED.field(name), column)
    return table


_DECODED_ROW = pa.schema(
    [f for f in schemas.DECODED if f.name not in ("frames", "widths", "heights")]
)


def failure(
    stage: str, error: Exception, unit: dict[str, Any], config: Config, compares: bool
) -> dict[str, Any]:
    """The columns that say why a unit failed. What is no MediaError is a fault of ours.

    compares: whether a model of the run compares with references.
    """
    if not isinstance(error, MediaError):
        error = InternalError(f"{unit['uri']}: {type(error).__name__}: {error}")
    return {
        "stage": stage,
        "code": error.code,
        "message": redacted(str(error)),
        "replay": config.replay(unit["uri"], unit["reference_uri"] if compares else None),
    }


# --- score stage --------------------------------------------------------------------------------


class ScoreUnits:
    """An actor that holds the model. Rows of frames in, the same rows with scores out."""

    def __init__(
        self, config: Config, weights: Sequence[Weights], shares: cluster.Shares, monitor: Any
    ) -> None:
        self.weights = weights
        self._scorers: list[Any] = []
        # Ray tries a constructor that fails again and again, and then its reason is lost: the
        # reason is kept until there is work.
        self._refused: RunError | None = None
        cluster.take_precedence()
        try:
            import torch

            from topiq_core.scorer import Scorer

            torch.set_num_threads(shares.threads)
            for (name, place), expected in zip(config.models, weights, strict=True):
                scorer = Scorer.load(
                    name,
                    weights=place,
                    # A booked GPU that does not work must be an error, not a slow night on CPUs.
                    device="cuda" if shares.actor_gpus else "cpu",
                    precision=config.precision,
                    verify=config.verify_weights,
                )
                if scorer.sha256 != expected.sha256:
                    raise RunError(f"{expected.card.name} has other weights than on the driver.")
                if shares.actor_gpus:
                    _try(scorer)
                self._scorers.append(scorer)
            if 0 < shares.actor_gpus < 1:
                # Scorers of one GPU keep what they took once: each is held to its share.
                torch.cuda.set_per_process_memory_fraction(0.95 * shares.actor_gpus)
        except Exception as error:  # a GPU that does not work is a RuntimeError of PyTorch's
            said = str(error) if isinstance(error, TopiqError) else f"no scorer starts ({error!r})"
            self._refused = RunError(f"on node {socket.gethostname()}: {said}")
        self.config = config
        self.monitor = monitor

    @property
    def scorers(self) -> "list[Scorer]":
        """Of each model, in the order of the weights. Raises RunError when one cannot be used."""
        if self._refused is not None:
            raise self._refused
        return self._scorers

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Frames of all rows are scored together, so that sizes batch across items."""
        if stopped(self.config, self.monitor):
            return
        rows = batch.drop_columns(["frames", "widths", "heights"]).to_pylist()
        views = [list(frames_of(batch, index)) for index in range(batch.num_rows)]
        results = [timed(self._score_rows, scorer, views) for scorer in self.scorers]
        total = sum(len(v) for v in views) or 1
        shares = [len(frames) / total for frames in views]
        yield self._finished(
            rows,
            [
                [(found[index], share * s) for found, s in results]
                for index, share in enumerate(shares)
            ],
        )

    def _finished(
        self, rows: list[dict[str, Any]], results: list[list[tuple[Any, float]]]
    ) -> pa.Table:
        """The rows of units as they are written: one for each model.

        results: for each unit and model its scores and seconds. In the place of scores may be the
        MediaError that came instead; then no model has scores of the unit, so that what is done can
        be told by the rows of the first one.
        """
        out = []
        for row, of_unit in zip(rows, results, strict=True):
            row["finished_at"] = datetime.now(UTC)
            errors = [result for result, _ in of_unit if isinstance(result, MediaError)]
            if errors:
                compares = self.weights[0].card.architecture.mode == "fr"
                said = failure("score", errors[0], row, self.config, compares)
                row |= dict.fromkeys(schemas.NULL_WHEN_FAILED) | said
                row["message"] = f"{row['uri']}: {errors[0]}"
            row[_FOLDER] = "failures" if row["code"] else "frame_scores"
            for weights, (result, seconds) in zip(self.weights, of_unit, strict=True):
                own = row | {"score": None if row["code"] else result, "score_s": seconds}
                if weights is not self.weights[0]:
                    own |= {
                        "unit_id": companion_id(row["unit_id"], weights),
                        "model": weights.card.name,
                        **dict.fromkeys(("decode_s", "wait_s", *schemas.MEASURES)),
                    }
                out.append(own)
        self._report(rows, [of_unit[0][0] for of_unit in results])
        return pa.Table.from_pylist(out, schema=_written_schema())

    def _score_rows(self, scorer: "Scorer", views: list[list[Any]]) -> list[Any]:
        """Scores of each row's frames; when that fails, row by row, to find the one at fault."""
        ends = np.cumsum([len(v) for v in views])
        try:
            scores = finite(scorer.score([frame for frames in views for frame in frames]))
            return [scores[end - len(v) : end] for v, end in zip(views, ends, strict=True)]
        except Exception as error:
            leave_a_lost_gpu(error)
            failed = as_media_error(error)
        # Not while the error is handled: it holds the memory of what was under way.
        if len(views) == 1:
            return [failed]
        return [self._score_rows(scorer, [frames])[0] for frames in views]

    def _report(self, rows: list[dict[str, Any]], scores: list[Any]) -> None:
        done = [len(found) for row, found in zip(rows, scores, strict=True) if row["code"] is None]
        if done:
            self.monitor.scored.remote(len(done), sum(done))
        failed = [row for row in rows if row["code"] is not None]
        # Waited for, so that what comes next knows of them.
        ray.get(
            [
                self.monitor.failed.remote(*(row[n] for n in ("unit_id", "uri", "code", "message")))
                for row in failed
            ]
        )


def _try(scorer: "Scorer") -> None:
    """Score a black frame: a GPU that PyTorch was not built for takes weights, and fails here."""
    frames = [np.zeros((64, 64, 3), np.uint8)]
    if scorer.card.architecture.mode == "fr":
        scorer.score_pairs(frames, frames)
    else:
        scorer.score(frames)


def timed(work: Callable[..., list[Any]], *given: Any) -> tuple[list[Any], float]:
    """What comes of a call, and the seconds that it takes."""
    started = time.perf_counter()
    return work(*given), time.perf_counter() - started


def finite(scores: Any) -> Any:
    """The scores. Raises ArithmeticError when one of them is none."""
    if not np.isfinite(scores).all():
        raise ArithmeticError("the network gave a score that is not a number")
    return scores


def frames_of(batch: pa.Table, index: int) -> Iterator[Any]:
    """The frames of a row as uint8 [H,W,3], views of the batch's own memory.

    Arrow's own values of binary columns are copies of what they hold.
    """
    blobs = batch["frames"][index].values
    if not blobs:
        return
    widths, heights = batch["widths"][index].as_py(), batch["heights"][index].as_py()
    _, offsets, data = blobs.buffers()
    starts = np.frombuffer(offsets, np.int64)[blobs.offset :]
    pixels = np.frombuffer(data, np.uint8)
    for start, width, height in zip(starts, widths, heights, strict=False):
        yield pixels[start : start + 3 * height * width].reshape(height, width, 3)


def leave_a_lost_gpu(error: Exception) -> None:
    """End this process when its GPU has failed: no call would work in it any more.

    Ray starts another one, which does the units again; they are not at fault.
    """
    import torch

    from topiq_core.scorer import out_of_memory

    if not isinstance(error, RuntimeError) or out_of_memory(error):
        return
    if "no kernel image" in str(error):
        return
    if isinstance(error, torch.AcceleratorError) or _gpu_is_lost():
        print(f"the GPU is lost, this scorer ends: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def _gpu_is_lost() -> bool:
    """Whether the GPU answers no more; libraries hide that behind errors of their own."""
    import torch

    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    try:
        torch.cuda.synchronize()
    except torch.AcceleratorError:
        return True
    return False


def as_media_error(error: Exception) -> MediaError:
    """What a failure to score means for the item."""
    from topiq_core.scorer import out_of_memory

    if isinstance(error, FrameError):
        return TooSmall(str(error))
    if out_of_memory(error):
        said = (str(error).splitlines() or [""])[0][:_SAID]
        return OutOfMemory(
            f"scoring one frame needs more memory than there is; lower max_pixels. ({said})"
        )
    return InternalError(f"scoring: {type(error).__name__}: {error}")


_SAID = 200  # characters of another library's error that are worth keeping


UNITS = Graph(PLAN_COLUMNS, None, decode_units, ScoreUnits)
"""Each unit by itself: no-reference models."""
