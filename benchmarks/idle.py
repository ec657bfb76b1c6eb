"""What an idle Ray costs the scorers beside it: frames a second of scoring alone, with and without.

    python benchmarks/idle.py [--rounds N] [--model CARD] [--json FILE]

In turn: no Ray, a Ray as `ray.init` starts it, and one as a run starts it (pipeline/cluster.py).
Both have eight actors that do nothing, about as many processes as a run has beside its scorers.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from endtoend import score_only
from machine import summarised

from pipeline import cluster

_AS_IT_IS = "ray.init(address='local', num_cpus=4, include_dashboard=False, log_to_driver=False)"
_AS_IN_RUNS = """
from pipeline import cluster
from pipeline.config import Config
cluster.connect(Config())
"""
_ACTORS = """
@ray.remote(num_cpus=0)
class Idle:
    def started(self):
        import ray.data
actors = [Idle.remote() for _ in range(8)]
ray.get([actor.started.remote() for actor in actors])
print("ready", flush=True)
input()
"""
WAYS = {"ray.init": _AS_IT_IS, "as in runs": _AS_IN_RUNS}
_SETTLE_S = 5.0  # what starts with Ray has started by then


@contextmanager
def idle_ray(start: str) -> Iterator[None]:
    """A cluster that does nothing while the body runs."""
    command = [sys.executable, "-c", f"import ray\n{start}{_ACTORS}"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    if "ready\n" not in iter(process.stdout.readline, ""):
        raise RuntimeError("Ray did not start")
    time.sleep(_SETTLE_S)
    try:
        yield
    finally:
        process.communicate("\n")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="cfanet_lite_nr")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    scorers = cluster.local_cpus()
    rounds = []
    for _ in range(options.rounds):
        alone = score_only(options.model, None, 1, scorers)
        found = {"alone": alone}
        for name, start in WAYS.items():
            with idle_ray(start):
                found[name] = score_only(options.model, None, 1, scorers)
            found[f"{name}, ratio"] = found[name] / alone
        rounds.append({k: round(v, 3) for k, v in found.items()})
        print(rounds[-1], flush=True)
    summarised(rounds, options.model, options.json)


if __name__ == "__main__":
    main()
