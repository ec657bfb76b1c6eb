"""What fewer bits do to scores: differences from fp32 over a folder of pictures.

    python benchmarks/precision.py FOLDER --count 200 --json results.json

What the device has is run: on a GPU fp16 and bf16, on a CPU bf16 with AMX and int8 with VNNI. What
a CPU has not in 16 bits is imitated as a GPU has it: weights and the result of every convolution
are rounded, products of tokens are in fp16, sums are kept in fp32, which is what tensor cores do;
the last bits differ. For a card that is not bundled, and without --weights, weights are made from
the names of parameters. Reads JPEG and PNG. Needs topiq_core, torch, torchvision and numpy only.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from model import made_weights  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torchvision.io import ImageReadMode, decode_image  # noqa: E402

from topiq_core import agreement, weights  # noqa: E402
from topiq_core.convolution import HAS_AMX, HAS_VNNI, FusedConv  # noqa: E402
from topiq_core.inference import MAP_TYPES  # noqa: E402
from topiq_core.scorer import Scorer  # noqa: E402


def rounded(scorer: Scorer, kind: torch.dtype) -> Scorer:
    """Make an fp32 scorer's maps and weights go through a 16-bit type, as on a GPU."""

    def through(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return out.to(kind).float()

    for part in (scorer.net.stages, scorer.net.gates):
        for buffer in part.buffers():
            buffer.copy_(buffer.to(kind))
        for module in part.modules():
            if isinstance(module, FusedConv):
                module.register_forward_hook(through)
    scorer.net.narrow_products(torch.float16)
    return scorer


def main() -> None:
    """Parse, score three times, print the distribution of differences."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--card", default="cfanet_lite_nr")
    parser.add_argument("--weights")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = device.type == "cpu"
    imitated = {"fp16": on_cpu, "bf16": on_cpu and not HAS_AMX, "int8": False}
    if not (on_cpu and HAS_VNNI):
        del imitated["int8"]
    with tempfile.TemporaryDirectory() as scratch:
        place = options.weights or made_weights(options.card, Path(scratch))
        found = weights.resolve(options.card, place, verify=place is None)

        def scorer(precision: Any) -> Scorer:
            net = weights.load(found)
            if imitated.get(precision):
                return rounded(Scorer(net, found.card, device), MAP_TYPES[precision])
            return Scorer(net, found.card, device, precision=precision)

        scorers = {precision: scorer(precision) for precision in ("fp32", *imitated)}

    kinds = {".jpg", ".jpeg", ".png"}
    files = sorted(p for p in options.folder.rglob("*") if p.suffix.lower() in kinds)
    chosen = files[:: max(1, len(files) // options.count)][: options.count]
    scores: dict[str, list[float]] = {precision: [] for precision in scorers}
    for path in chosen:
        frame = decode_image(str(path), ImageReadMode.RGB).permute(1, 2, 0).contiguous()
        for precision, one in scorers.items():
            scores[precision].append(float(one.score([frame])[0]))
    exact = np.array(scores["fp32"], np.float32)
    report: dict[str, Any] = {
        "card": options.card,
        "frames": len(chosen),
        "imitated": [precision for precision, is_imitated in imitated.items() if is_imitated],
        "fp32_std": float(exact.std()),
    }
    print("| card | precision | frames | max | p99 | mean | SROCC with fp32 |\n" + "|---" * 7 + "|")
    for precision in imitated:
        ours = np.array(scores[precision], np.float32)
        error = np.abs(ours - exact)
        entry = {"max": float(error.max()), "p99": float(np.quantile(error, 0.99))}
        entry |= {"mean": float(error.mean()), "srocc": agreement.srocc(ours, exact)}
        report[precision] = entry
        print(
            f"| {options.card} | {precision} | {len(chosen)} | {entry['max']:.1e} "
            f"| {entry['p99']:.1e} | {entry['mean']:.1e} | {entry['srocc']:.5f} |"
        )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
