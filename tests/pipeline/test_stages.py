import pytest

from pipeline import stages
from pipeline.cluster import Shares
from pipeline.stages import Stage, Stages

CPUS = Shares(
    decode_tasks=2, decode_cpus=0.5, score_actors=1, actor_cpus=0.25, actor_gpus=0.0, threads=2,
    light_cpus=0.25, write_tasks=2,
)  # fmt: skip
GPUS = Shares(
    decode_tasks=16, decode_cpus=1.0, score_actors=1, actor_cpus=1.0, actor_gpus=1.0, threads=1,
    light_cpus=0.25, write_tasks=2,
)  # fmt: skip


def found(decode_busy, waiting, score_busy):
    return Stages(
        Stage(2, 10.0, 5.0, 100.0, decode_busy, waiting),
        Stage(1, 10.0, 5.0, 100.0, score_busy, None),
        frames=50,
    )


@pytest.mark.parametrize(
    ("busy", "shares", "name", "advice"),
    [
        ((0.9, 0.1, 0.5), CPUS, "decode", "decode_tasks"),
        ((0.9, 0.8, 0.5), CPUS, "io", "storage"),
        ((0.5, 0.1, 0.95), CPUS, "score", "score on a GPU"),
        ((0.5, 0.1, 0.95), GPUS, "score", "add GPUs"),
        ((0.1, 0.9, 0.2), GPUS, "overhead", "start-up"),
    ],
)
def test_the_stage_that_held_the_run_up_is_named_with_what_to_change(busy, shares, name, advice):
    bottleneck, text = stages.verdict(found(*busy), shares)
    assert bottleneck == name
    assert advice in text


def test_a_run_that_scored_nothing_has_no_bottleneck():
    idle = Stage(2, 0.0, None, None, None, None)
    assert stages.verdict(Stages(idle, idle, 0), CPUS) is None
