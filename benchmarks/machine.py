"""What machine a figure is from, and what is kept of rounds that were measured on it."""

import json
import os
import platform
import re
import statistics
from pathlib import Path


def described() -> dict[str, object]:
    """Processor, its vector instructions, cores, memory and versions: for the head of a result."""
    import torch

    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*:\s*(.*)", text)
    flags = set(re.findall(r"avx2|avx512f|avx512_vnni|avx_vnni|amx_int8", text))
    found: dict[str, object] = {
        "cpu": name[1] if name else platform.processor(),
        "isa": sorted(flags),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def summarised(rounds: list[dict[str, float]], model: str, path: Path | None) -> None:
    """Print the medians of rounds, and keep all of it when a path is given."""
    medians = {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}
    print("median", medians)
    if path:
        record = {"machine": described(), "model": model, "rounds": rounds, "median": medians}
        path.write_text(json.dumps(record, indent=1) + "\n")
