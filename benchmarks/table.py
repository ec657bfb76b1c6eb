"""The table of docs/benchmarks.md from results of benchmarks/model.py.

python benchmarks/table.py benchmarks/results/topiq_nr.json ...
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COLUMNS = ["card", "size", "precision", "ms", "pyiqa ms", "times faster", "plain ms"]
COLUMNS += ["times faster", "peak MB pyiqa", "plain", "ours", "scores differ by"]


def rows(result: dict[str, Any]) -> Iterator[list[str]]:
    """A row for each precision of one size. Ratios are medians over rounds."""
    found = result["contenders"]
    shared = f", {result['batch']} renditions of one reference" if result["renditions"] else ""
    size = result["size"]
    if result["batch"] > 1 and not shared:
        size += f" in batches of {result['batch']}"
    others = [found.get(name) for name in ("pyiqa", "plain")]
    for name, ours in found.items():
        if name in ("pyiqa", "plain", "plain-ieee"):
            continue
        row = [f"`{result['card']}`{shared}", size, name, milliseconds(ours)]
        for other, mark in zip(others, ("**", ""), strict=True):
            if other is None:
                row += ["-", "-"]
                continue
            ratio = median_ratio(other["rounds_ms"], ours["rounds_ms"])
            row += [milliseconds(other), f"{mark}{ratio:.2f}{mark}"]
        row += [f"{other['peak_mb']:.0f}" if other else "-" for other in others]
        yield [*row, f"{ours['peak_mb']:.0f}", f"{ours['largest_difference']:.1e}"]


def milliseconds(of: dict[str, Any]) -> str:
    """Of a frame, to three digits or more."""
    ms = of["ms_per_frame_median"]
    return f"{ms:.0f}" if ms >= 99.5 else f"{ms:.3g}"


def median_ratio(theirs: list[float], ours: list[float]) -> float:
    """Of times by the round."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    options = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for path in options.results:
        for result in json.loads(path.read_text())["results"]:
            for row in rows(result):
                print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
