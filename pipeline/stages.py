"""How busy each stage of a run was, which one held it up, and what to change."""

from dataclasses import dataclass
from typing import Literal

from pipeline import schemas
from pipeline.cluster import Shares
from pipeline.output import Output, database
from topiq_core.cards import Card

Bottleneck = Literal["decode", "score", "io", "overhead"]

# Below this, the busiest stage was idle most of the time: it was not what the run waited for.
_BUSY = 0.4
# Decoders that wait for storage for longer than this share of their time are not what is slow.
_WAITING = 0.5


@dataclass(frozen=True)
class Stage:
    """How one stage of the run did. `busy` is the share of its workers' time spent working.

    `waiting` is the share of that in which it waited for storage.
    """

    workers: int
    seconds: float
    frames_per_s: float | None
    pixels_per_s: float | None
    busy: float | None
    waiting: float | None


@dataclass(frozen=True)
class Stages:
    """Both stages of a run, and the frames that it scored."""

    decode: Stage
    score: Stage
    frames: int


_QUERY = """
SELECT coalesce(sum(len(score)) FILTER (model = $model), 0)::BIGINT,
       coalesce(sum(len(score) * pixels) FILTER (model = $model), 0)::BIGINT,
       coalesce(sum(decode_s), 0),
       coalesce(sum(wait_s), 0),
       coalesce(sum(score_s), 0)
FROM (
    SELECT *, frame.width::BIGINT * frame.height
              * coalesce(($side::DOUBLE / least(frame.width, frame.height)) ** 2, 1) AS pixels
    FROM table_of_run WHERE run_id = $run_id
)
"""


def of_run(output: Output, run_id: str, card: Card, shares: Shares, seconds: float) -> Stages:
    """What the rows that a run wrote in `seconds` of scoring tell of its stages.

    Frames, and their pixels as the model sees them, are counted once, by the rows of the model of
    `card`; the seconds are those of all models.
    """
    connection = database()
    files = output.parquet_files("frame_scores")
    if files:
        columns = ["run_id", "model", "score", "frame", "decode_s", "wait_s", "score_s"]
        connection.register("table_of_run", output.scan(files, schemas.OUTCOME, columns))
        wanted = {"run_id": run_id, "model": card.name, "side": card.short_side}
        found = connection.execute(_QUERY, wanted).fetchall()[0]
    else:
        found = (0, 0, 0.0, 0.0, 0.0)
    frames, pixels, decode_s, wait_s, score_s = found

    def stage(workers: int, busy_s: float, wait_s: float | None) -> Stage:
        if not frames or not busy_s:
            return Stage(workers, round(busy_s, 3), None, None, None, None)
        return Stage(
            workers,
            round(busy_s, 3),
            frames_per_s=round(frames * workers / busy_s, 2),
            pixels_per_s=round(pixels * workers / busy_s),
            busy=round(busy_s / (workers * seconds), 3),
            waiting=None if wait_s is None else round(wait_s / busy_s, 3),
        )

    return Stages(
        decode=stage(shares.decode_tasks, decode_s, wait_s),
        score=stage(shares.score_actors, score_s, None),
        frames=int(frames),
    )


def verdict(stages: Stages, shares: Shares) -> tuple[Bottleneck, str] | None:
    """What held a run up, and what to change; None when it scored nothing."""
    decode, score = stages.decode, stages.score
    if not stages.frames or decode.busy is None or score.busy is None:
        return None
    if max(decode.busy, score.busy) < _BUSY:
        return "overhead", (
            "start-up and hand-over took most of the time: nothing to tune for so little work"
        )
    if score.busy >= decode.busy:
        if shares.actor_gpus:
            return "score", (
                "the GPUs were the limit: try precision=fp16 and gpus_per_actor=0.5, or add GPUs"
            )
        return "score", (
            "scoring on CPUs was the limit: add CPUs, score on a GPU, or try precision=bf16 (needs "
            "AMX) or int8 (needs VNNI)"
        )
    if (decode.waiting or 0.0) > _WAITING:
        return "io", (
            "decoders waited for storage: raise decode_tasks, or bring the run nearer to the media"
        )
    return "decode", "decoding was the limit: add CPUs and decode_tasks, or sample fewer frames"
