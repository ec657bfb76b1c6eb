"""Ray: connect to the cluster at hand or start one here, and share out its CPUs and GPUs."""

import atexit
import logging
import math
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
import ray.data
import tenacity
from ray._common.utils import get_system_memory
from ray._private.utils import get_num_cpus
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.exceptions import ExecutionTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.config import Config
from pipeline.errors import RunError, ScorersDied
from pipeline.monitor import BEAT_S
from topiq_core import environment

# CPUs that a local cluster is said to have beyond the real ones. Ray Data's own stages (reading,
# writing, the checkpoint filter) book CPUs that they hardly use; without room for them, a pool of
# actors and a reader can wait for each other for ever on a small machine.
SPARE_CPUS = 2

# What Ray keeps about itself for its dashboard, which a cluster started here has not.
_WITHOUT_DASHBOARD = {"enable_metrics_collection": False, "task_events_report_interval_ms": 0}


@dataclass(frozen=True)
class Shares:
    """Who gets what. CPU numbers are bookings in Ray's ledger; `threads` are real."""

    decode_tasks: int
    decode_cpus: float
    score_actors: int
    actor_cpus: float
    actor_gpus: float
    threads: int
    light_cpus: float
    """Booked by stages that only read or write tables."""
    write_tasks: int
    """At once at most: what they might book otherwise is kept from the decoders."""


# A scorer with its model, a decoder and Ray need this beside the object store.
_LEAST_BYTES = 2 << 30


def quieten() -> None:
    """Leave progress to our own line, and Ray Data's chatter to its log files."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    context.issue_detectors_config.detectors = []
    # The newer Parquet reader starts actors of its own to read footers, which costs more than
    # reading a plan does.
    context.use_datasource_v2 = False
    # What goes wrong is raised, and shown as one error of ours.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    for name in ("ray._private.authentication", "ray._private.worker"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Both are part of the version of Ray that is pinned; what replaces them comes with the next.
    warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
    warnings.filterwarnings("ignore", message="The maximum number of concurrent tasks.*")
    warnings.filterwarnings("ignore", message="The minimum number of concurrent actors.*")


def leave_room_to_decode() -> None:
    """Let stages take what others do not use.

    By itself Ray Data keeps half of the CPUs, and half of the object store that it uses at all,
    for stages that need next to nothing here: of 16 decoders 7 were at work then, and a GPU waited
    for frames (benchmarks/decoders.py). Each stage still has what one task of it needs.
    """
    context = ray.data.DataContext.get_current()
    context.op_resource_reservation_ratio = 0.1
    context.override_object_store_memory_limit_fraction = 0.65  # at 0.8 Ray takes to the disk


def connect(config: Config) -> None:
    """Join the cluster that RAY_ADDRESS names (`ray job submit` sets it), or start one here.

    A cluster started here listens on loopback only and ends with this process. One that is
    joined may still have to start its nodes: they are asked for and waited for.
    Raises RunError when they do not come.
    """
    quieten()
    leave_room_to_decode()
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            _await_head(address)
            ray.init(logging_level=logging.WARNING, log_to_driver=False)
        except (ray.exceptions.RayError, ValueError, OSError, RuntimeError) as error:
            raise RunError(_not_joined(address, error)) from error
        _await_nodes(config)
        return
    memory = int(get_system_memory())
    most = max(8, local_cpus()) << 30
    store = config.object_store_bytes or min(most, max(512 << 20, memory // 5))
    if memory - store < _LEAST_BYTES:
        raise RunError(
            f"this machine, or its container, has {memory} bytes of memory: with an object store "
            f"of {store} too little is left to decode and score. Lower object_store_bytes, or take "
            "a larger machine."
        )
    try:
        with _giving_way(), _scorers_environment():
            ray.init(
                address="local",
                num_cpus=local_cpus() + SPARE_CPUS,
                object_store_memory=store,
                include_dashboard=False,
                logging_level=logging.WARNING,
                log_to_driver=False,
                _system_config=_WITHOUT_DASHBOARD,
            )
    except Exception as error:  # Ray raises nothing more special
        raise RunError(
            f"Ray did not start on this machine ({error}). It gives up after half a minute or so: "
            "when the machine is very busy, try again later."
        ) from error
    global _started
    _started = ray.get_runtime_context().gcs_address
    _end_idle_servers()
    atexit.register(_shut_down)


# The address of the cluster that this process has started.
_started: str | None = None


@contextmanager
def _scorers_environment() -> Iterator[None]:
    """Processes started in the body have the environment of scorers, whatever they come to be."""
    before = {name: os.environ.get(name) for name in environment.CPU_SCORER}
    os.environ.update(environment.CPU_SCORER)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def for_cpu_scorers() -> dict[str, Any]:
    """The `runtime_env` of an actor that scores on a CPU.

    Empty where we started the cluster and all processes have that environment: a waiting worker
    can then become a scorer, where Ray would start another one for an environment of its own.
    """
    if ray.get_runtime_context().gcs_address == _started:
        return {}
    return {"env_vars": environment.CPU_SCORER}


def _await_head(address: str) -> None:
    """Wait until a head node listens at HOST:PORT, for a while: Ray alone would take minutes.

    Raises OSError when none does.
    """
    if "://" in address or (port := urlsplit(f"//{address}").port) is None:
        return
    host = urlsplit(f"//{address}").hostname
    tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(OSError),
        stop=tenacity.stop_after_delay(_HEAD_PATIENCE_S),
        wait=tenacity.wait_fixed(1),
        reraise=True,
    )(lambda: socket.create_connection((host, port), timeout=10).close())


_HEAD_PATIENCE_S = 30  # it may be about to start


def _not_joined(address: str, error: Exception) -> str:
    if address.startswith("http"):
        return (
            f"RAY_ADDRESS {address}: jobs are submitted there. Use `ray job submit --address`, or "
            "unset RAY_ADDRESS to run on this machine."
        )
    said = str(error).strip().partition("\n")[0]
    advice = "Check that it runs, or unset RAY_ADDRESS to run on this machine."
    if isinstance(error, ray.exceptions.AuthenticationError):
        advice = "Set RAY_AUTH_MODE=token, with the token of the cluster in ~/.ray/auth_token."
    return f"RAY_ADDRESS {address}: this cluster cannot be joined ({said}). {advice}"


@contextmanager
def _giving_way() -> Iterator[None]:
    """Processes started in the body, and theirs in turn, do not interrupt others when they wake up.

    Ray's servers and workers wake up more than a thousand times a second, mostly for nothing. With
    SCHED_BATCH (sched(7)) they wait for the scheduler's next tick, some milliseconds, when all CPUs
    are busy. Scorers go back to the usual policy by `take_precedence`.
    """
    if not hasattr(os, "sched_setscheduler") or os.sched_getscheduler(0) != os.SCHED_OTHER:
        yield  # not on Linux, or someone has chosen otherwise for all of us
        return
    _set_policy(os.SCHED_BATCH)
    try:
        yield
    finally:
        _set_policy(os.SCHED_OTHER)


def take_precedence() -> None:
    """Let this process interrupt those that give way, as processes usually may."""
    if hasattr(os, "sched_setscheduler") and os.sched_getscheduler(0) == os.SCHED_BATCH:
        _set_policy(os.SCHED_OTHER)


def _set_policy(policy: int) -> None:
    with suppress(OSError):  # a sandbox that forbids it: slower, not wrong
        os.sched_setscheduler(0, policy, os.sched_param(0))


def _end_idle_servers() -> None:
    """End the servers of a cluster started here that have nothing to do but cost CPU time.

    No logs go to the driver, no nodes are started, and the dashboard is only there to say how Ray
    is used. `ray.init` has no options that leave them out.
    """
    node = ray._private.worker._global_node
    for end in (node.kill_log_monitor, node.kill_monitor, node.kill_dashboard):
        end(check_alive=False)


def _shut_down() -> None:
    """End a cluster started here, and those of its workers that hang in their own exit.

    Ray has let go of such a worker already, and would leave it behind with 200 MB: of an actor of
    Ray Data's checkpoint one in ten or twenty hangs.
    """
    if not ray.is_initialized() or not hasattr(os, "pidfd_open"):
        return
    if ray.get_runtime_context().gcs_address != _started:
        return  # the program has joined another one since
    node = ray._private.worker._global_node
    raylets = {started.process.pid for started in node.all_processes["raylet"]}
    workers = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
            if parent in raylets:
                workers.append(os.pidfd_open(int(stat.parent.name)))
    ray.shutdown()
    for worker in workers:
        with suppress(OSError):
            signal.pidfd_send_signal(worker, signal.SIGKILL)
        os.close(worker)


def _scorers_on_a_gpu(config: Config) -> int:
    """A scorer's part of a GPU is of one GPU: of three quarters there is room for one on each."""
    return int(1 / config.gpus_per_actor)


def _await_nodes(config: Config) -> None:
    from ray.autoscaler.sdk import request_resources

    bundles: list[dict[str, float]] = [{"CPU": 1}] * max(2, config.decode_tasks)
    gpus = 0
    if config.device == "cuda":
        actors = max(1, config.score_actors)
        gpus = math.ceil(actors / _scorers_on_a_gpu(config))
        bundles += [{"GPU": config.gpus_per_actor}] * actors
    request_resources(bundles=bundles)
    patience = time.monotonic() + config.wait_for_nodes_s
    while True:
        have = ray.cluster_resources()
        if have.get("CPU", 0) >= 2 and have.get("GPU", 0) >= gpus:
            return
        if time.monotonic() > patience:
            raise RunError(
                f"the cluster has {have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs after "
                f"{config.wait_for_nodes_s:g} s; 2 CPUs and {gpus} GPUs are needed. Check the "
                "autoscaler, or raise wait_for_nodes_s."
            )
        time.sleep(1)


@contextmanager
def ended_when_stuck(seconds: float, monitor: Any) -> Iterator[None]:
    """Datasets that are made in the body are given up when nothing has moved for so long.

    Ray Data sees blocks move. What goes on within a task, which may take hours over a block of
    files that each hang until they are given up, its tasks tell the monitor.
    """

    class Beats(ExecutionCallback):  # type: ignore[misc]
        """A beat since the last look counts as a block that moved."""

        def __init__(self) -> None:
            self.looked, self.moved = time.monotonic(), -1

        def on_execution_step(self, executor: Any) -> None:
            """Called by Ray Data, many times a second."""
            now = time.monotonic()
            if now - self.looked < BEAT_S:
                return
            moved = ray.get(monitor.moved.remote())
            if moved != self.moved:
                executor._no_progress_guard._last_progress_time = now
            self.looked, self.moved = now, moved

    context = ray.data.DataContext.get_current()
    before = context.execution_no_progress_timeout_s, context.custom_execution_callback_classes
    context.execution_no_progress_timeout_s = seconds
    context.custom_execution_callback_classes = [*before[1], Beats]
    try:
        yield
    finally:
        context.execution_no_progress_timeout_s = before[0]
        context.custom_execution_callback_classes = before[1]


def bounded_retries() -> dict[str, Any]:
    """For tasks that open media: a file that kills its worker each time must not loop for ever."""
    return {"max_retries": 3}


def bounded_actor_retries() -> dict[str, Any]:
    """For scorers: one that dies each time (for want of memory) must end the run, not loop."""
    return {"max_task_retries": 3}


@contextmanager
def beside_driver(kind: type) -> Iterator[Any]:
    """An actor on the driver's node, as other nodes may go away; it lives while the body runs.

    It is ended by hand: Ray keeps an actor whose handle was given to tasks for as long as it runs
    itself.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, scheduling_strategy=here)(kind).remote()
    try:
        yield actor
    finally:
        with suppress(ray.exceptions.RayError):  # the error of the body is the one to show
            ray.kill(actor)


def run_error(error: Exception) -> RunError:
    """The error to show for one of Ray's: ours if one is at its root."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, RunError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    text = str(error)
    if isinstance(error, ray.exceptions.ActorUnavailableError | ray.exceptions.ActorDiedError):
        return ScorersDied(
            "a scoring process died again and again; most often the machine ran out of memory, or "
            "a GPU failed. Lower max_pixels, unit_bytes or object_store_bytes, or take another "
            "machine. What is scored is kept: the same command goes on where this one stopped."
        )
    if isinstance(error, ExecutionTimeoutError):
        doing = [line.strip(" -") for line in text.splitlines() if line.startswith("  - ")]
        return RunError(
            "nothing moved for as long as no_progress_timeout_s allows; the run was stopped. "
            f"At that time: {'; '.join(doing)}. Look at the nodes, at their memory, and at storage "
            "that does not answer (each file may take decode_timeout_s); what is scored is kept, "
            "and the same command goes on where this one stopped."
        )
    if "No space left on device" in text:
        return RunError(
            "no space left on a disk, most likely the output's. Free some; what is scored is kept, "
            "and the same command goes on where this one stopped."
        )
    last = [line for line in text.splitlines() if line.strip()]
    return RunError(f"Ray gave up: {last[-1] if last else type(error).__name__}")


def local_cpus() -> int:
    """CPUs that this process may use: by its affinity, and by the limits of its container."""
    allowed = max(1, int(get_num_cpus(override_docker_cpu_warning=True)))
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return min(allowed, len(os.sched_getaffinity(0)))
    return allowed


def _places(nodes: list[dict[str, float]], cpus: float) -> list[float]:
    """CPUs of each node that has so many."""
    return [node["CPU"] for node in nodes if node.get("CPU", 0) >= cpus]


# What a scorer on a CPU holds: itself with its model, and for each pixel of a frame. Scorers may
# take so much of the memory that Ray has to give.
_SCORER_BYTES, _SCORER_BYTES_A_PIXEL, _SCORERS_SHARE = 1 << 30, 300, 0.7


def shares(config: Config, largest_pixels: int | None = None, units: int | None = None) -> Shares:
    """Divide the cluster between decoding and scoring. Raises RunError when it has too little.

    largest_pixels: of a frame, when it is known; without it a frame may have `max_pixels`. units:
    of the plan, when it is made: there are no more scorers than that. On CPUs as many scorers of
    one thread as have room in memory are a quarter faster than one with two threads; of large
    frames there is room for fewer, with more threads each.

    What scorers book leaves room for a decoder on one node at least, wherever Ray places them:
    without decoders, scorers wait for ever.
    """
    have: dict[str, Any] = ray.cluster_resources()
    booked = int(have.get("CPU", 0))
    gpus = float(have.get("GPU", 0))
    started_here = not os.environ.get("RAY_ADDRESS")
    cpus = max(1, booked - SPARE_CPUS) if started_here else booked
    if booked < 2:
        raise RunError(f"the cluster has {booked} CPUs; 2 are needed to decode and score.")
    if config.device == "cuda" and not gpus:
        raise RunError("device cuda was asked for, but the cluster has no GPU.")
    use_gpus = gpus > 0 and config.device != "cpu"
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    working = [node for node in nodes if node.get("CPU", 0) >= 1]  # a head may have none
    largest = max(node["CPU"] for node in working)
    small = booked < 4
    light_cpus, decode_cpus = 0.25, 1.0
    places = _places(working, decode_cpus + light_cpus)
    if small or sum(places) <= 3:
        decode_cpus = 0.5
        places = _places(working, decode_cpus + light_cpus)
    kept = (decode_cpus + light_cpus) * len(places)
    most_actors = sys.maxsize if units is None else max(1, units)
    if use_gpus:
        most_actors = min(most_actors, int(gpus) * _scorers_on_a_gpu(config))
        actors = config.score_actors or max(1, most_actors)
        most, threads = (sum(places) - max(2.0, kept)) / actors, 1
    else:
        each = _SCORER_BYTES + _SCORER_BYTES_A_PIXEL * (largest_pixels or config.max_pixels)
        spare = SPARE_CPUS if started_here else 0
        fitting = (
            min(max(1, int(node["CPU"]) - spare), max(1, int(node["CPU"]) // 4, room))
            for node in working
            for room in [int(_SCORERS_SHARE * node.get("memory", 0) / each)]
        )
        actors = config.score_actors or min(most_actors, sum(fitting))
        most_threads = min(4 if cpus >= 8 else cpus, int(largest) - spare)
        threads = max(1, min(most_threads, cpus // actors))
        # A booking must fit on one node, and leave room for a decoder beside the actor.
        most = min((sum(places) - max(3.0, kept)) / actors, largest / 2)
    decode_tasks = config.decode_tasks or cpus
    return Shares(
        decode_tasks=decode_tasks,
        decode_cpus=decode_cpus,
        score_actors=actors,
        actor_cpus=0.25 if small else min(float(threads), most),
        actor_gpus=config.gpus_per_actor if use_gpus else 0.0,
        threads=threads,
        light_cpus=light_cpus,
        write_tasks=max(2, decode_tasks // 4),
    )
