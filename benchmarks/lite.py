"""How much faster the bundled no-reference model is than ResNet-50's, on this CPU, at 1080p.

    python benchmarks/lite.py [--rounds 5]

Both networks in fp32 in one process, in the environment of scorers, in turn; the median of rounds.
Speed does not depend on weights, which are untrained here. Needs topiq_core and torch only.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from topiq_core import cards, environment
from topiq_core.cfanet import CFANet
from topiq_core.inference import InferenceNet


def main() -> None:
    """Parse, measure in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in environment.CPU_SCORER.items()):
        os.environ.update(environment.CPU_SCORER)  # read when a process starts
        os.execv(sys.executable, [sys.executable, *sys.argv])
    names = ("topiq_nr", "cfanet_lite_nr")
    nets = {name: InferenceNet(CFANet(cards.find(name)[0].architecture)) for name in names}
    pixels = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (1, 1080, 1920, 3), np.uint8)
    frame = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with torch.inference_mode():
        for _ in range(options.rounds):
            for name, net in nets.items():
                net(frame)
                started = time.perf_counter()
                net(frame)
                seconds[name].append(time.perf_counter() - started)
    slow, fast = (statistics.median(seconds[name]) for name in names)
    print(
        f"{names[0]} {1000 * slow:.0f} ms, {names[1]} {1000 * fast:.0f} ms: {slow / fast:.2f} times"
    )


if __name__ == "__main__":
    main()
