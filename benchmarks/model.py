"""How fast the network is, and how much memory it takes, against its plain form and pyiqa.

    python benchmarks/model.py --sizes 512x384,1024x768 --rounds 5 --json results.json
    python benchmarks/model.py --card topiq_fr --pyiqa /path/to/other/env/bin/python
    python benchmarks/model.py --card topiq_fr --renditions 5
    python benchmarks/model.py --device cuda --precisions fp32,fp16,fp16+compile --batches 1,16

Every contender is a process of its own with the same weights (made from the names of parameters
for cards that are not bundled), and they take turns: in each round everyone scores the same frames
once. A ratio is the median over rounds of one contender's time by another's in the same round.
Ours run in the environment that `topiq score` gives its scorers, the others as users run them.
Times are wall time and, on a CPU, processor time, which a busy machine disturbs less. Memory is
the peak of all calls above what the loaded model held before the first. GFLOP are those of the
network as we compute it, counted on shapes alone; a GPU's rates are measured first, by one product
of matrices and one copy. There a call takes `--passes` batches, so that uploads overlap as they do
in a run; but for the first call, one batch before is not timed, as memory is given back between
turns. `plain`, which has TF32 in its convolutions as PyTorch has by default, is joined by
`plain-ieee`, which has none and which scores are compared with. `+compile` is torch.compile with
CUDA graphs, its first call an eager one and all the compiling; `+steps` is without cuDNN's kernels
for a convolution, sum and ReLU in one. Needs topiq_core, torch, numpy and safetensors only; pyiqa,
if asked for, is run in the environment it is installed in.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from topiq_core.environment import CPU_SCORER  # noqa: E402

Score = Callable[[np.ndarray, np.ndarray], np.ndarray]
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_tile")


# --- one contender's process -----------------------------------------------------------------


def serve(options: argparse.Namespace) -> None:
    """Answer each line on stdin, the path of an .npz of frames, with one line of measurements."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print must not speak in between
    torch.set_num_threads(options.threads)
    score = contender(options)
    on_gpu = options.device == "cuda"
    for turn, line in enumerate(sys.stdin):
        frames = np.load(line.strip())
        one = [frames["distorted"]] * 2
        if "fr" in options.card:
            one[1] = frames["reference"]
        if on_gpu and turn:
            score(*one)
        # Of one side, both are one array.
        many = {id(side): np.tile(side, (options.passes, 1, 1, 1)) for side in one}
        answer = measured(score, [many[id(side)] for side in one], options.device)
        if on_gpu:
            torch.cuda.empty_cache()  # others share the GPU
        print(json.dumps(answer), file=answers, flush=True)


def measured(score: Score, sides: list[np.ndarray], device: str) -> dict[str, Any]:
    """Score once. Times in ms, memory in MB."""
    distorted, reference = sides
    before = reset_peak(device)
    wall, cpu = time.perf_counter(), time.process_time()
    scores = score(distorted, reference)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "ms": 1e3 * wall,
        "cpu_ms": 1e3 * cpu,
        "held_mb": before,
        "peak_mb": peak_mb(device),
        "scores": [float(s) for s in scores],
    }


def reset_peak(device: str) -> float:
    """Forget the peak so far; returns what is held now."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e6
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mb(device)


def peak_mb(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def contender(options: argparse.Namespace) -> Score:
    name = options.serve
    if name == "pyiqa":
        return pyiqa(options)
    if name == "plain-ieee":
        torch.backends.cudnn.allow_tf32 = False
    if name in PLAIN:
        return plain(options)
    precision, _, way = name.partition("+")
    return ours(options, precision, way)


PLAIN = "plain", "plain-ieee"


def ours(options: argparse.Namespace, precision: Any, way: str) -> Score:
    from topiq_core import weights
    from topiq_core.convolution import FusedConv
    from topiq_core.scorer import Scorer

    found = weights.resolve(options.card, options.weights, verify=False)
    # Built from its parts: what is measured here is not up for refusal.
    device = torch.device(options.device)
    card = dataclasses.replace(found.card, calibration=None)  # the plain network has none
    scorer = Scorer(weights.load(found), card, device, precision=precision)
    if way == "steps":
        for module in scorer.net.modules():
            if isinstance(module, FusedConv):
                module.by_cudnn = False

    def score(distorted: np.ndarray, reference: np.ndarray) -> np.ndarray:
        scorer.batch_pixels = scorer.most_pixels = options.batch * distorted[0].size // 3
        if scorer.card.architecture.mode == "nr":
            return scorer.score(distorted)
        if options.renditions:
            return scorer.score_renditions(distorted, reference[0])
        return scorer.score_pairs(distorted, reference)

    if way != "compile":
        return score
    waits = True

    def compiled(distorted: np.ndarray, reference: np.ndarray) -> np.ndarray:
        nonlocal waits
        if waits:
            # A first call lays out what is kept from then on, such as positions: within a CUDA
            # graph it would lie in memory that the graph's next run writes over.
            score(distorted[: options.batch], reference[: options.batch])
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            scorer.net.compile(fullgraph=True, mode="reduce-overhead", dynamic=False)
            waits = False
        return score(distorted, reference)

    return compiled


def plain(options: argparse.Namespace) -> Score:
    from topiq_core import weights

    found = weights.resolve(options.card, options.weights, verify=False)
    net = weights.load(found).to(options.device)
    return in_batches(net, options, full_reference=found.card.architecture.mode == "fr")


def pyiqa(options: argparse.Namespace) -> Score:
    import timm

    create = timm.create_model
    # It would fetch ImageNet weights first, and then replace them by those of the file.
    timm.create_model = lambda *args, **kwargs: create(*args, **{**kwargs, "pretrained": False})
    import pyiqa

    metric = pyiqa.create_metric(
        options.card, device=options.device, pretrained_model_path=options.weights
    )
    return in_batches(metric, options, full_reference="fr" in options.card)


def in_batches(
    net: Callable[..., torch.Tensor], options: argparse.Namespace, full_reference: bool
) -> Score:
    """As users call a module: floats in 0..1, no gradients, pairs and renditions one by one."""
    together = 1 if options.renditions else options.batch

    @torch.no_grad()
    def score(distorted: np.ndarray, reference: np.ndarray) -> np.ndarray:
        sides = (distorted, reference) if full_reference else (distorted,)
        out = []
        for start in range(0, len(distorted), together):
            parts = (torch.from_numpy(side[start : start + together]) for side in sides)
            # Contiguous, as readers of pictures make them: strides alone would make the network
            # work in channels-last memory.
            pixels = (p.to(options.device).permute(0, 3, 1, 2).contiguous() for p in parts)
            tensors = [p.float() / 255 for p in pixels]
            out.append(net(*tensors).flatten().cpu().numpy())
        return np.concatenate(out)

    return score


# --- the comparison ----------------------------------------------------------------------------


class Contender:
    """A process that scores when asked."""

    def __init__(self, name: str, python: str, options: list[str], quiet: bool) -> None:
        self.command = [python, __file__, "--serve", name, *options]
        ours_on_cpu = name not in (*PLAIN, "pyiqa") and "cuda" not in options
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
            text=True,
            env=os.environ | (CPU_SCORER if ours_on_cpu else {}),
        )

    def ask(self, frames: Path) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(frames, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise EOFError(f"{' '.join(self.command)}\nended without an answer")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def compare(options: argparse.Namespace, folder: Path, size: str, batch: int) -> dict[str, Any]:
    """All contenders in turn on one size and batch."""
    count = options.renditions or batch
    frames = save_frames(folder / f"{size}x{count}.npz", size, count, bool(options.renditions))
    passed = ["--card", options.card, "--device", options.device, "--batch", str(batch)]
    passed += ["--threads", str(options.threads), "--renditions", str(options.renditions)]
    passed += ["--passes", str(options.passes)]
    if options.weights:
        passed += ["--weights", options.weights]
    own = [*(PLAIN if options.device == "cuda" else PLAIN[:1]), *options.precisions.split(",")]
    pythons = dict.fromkeys(own, sys.executable)
    if options.pyiqa:
        pythons = {"pyiqa": options.pyiqa} | pythons
    contenders = {
        name: Contender(name, python, passed, quiet=name == "pyiqa")
        for name, python in pythons.items()
    }
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    try:
        for _ in range(1 + options.rounds):
            for name in list(answers):
                try:
                    answers[name].append(contenders[name].ask(frames))
                except EOFError as error:  # out of memory, most likely: the others go on
                    print(error, file=sys.stderr)
                    del answers[name]
    finally:
        for c in contenders.values():
            c.close()
    if not answers:
        raise SystemExit(f"no contender could score {size} in batches of {batch}")
    first = {name: turns[0] for name, turns in answers.items()}
    rounds = [
        {name: turns[i] for name, turns in answers.items()} for i in range(1, 1 + options.rounds)
    ]
    base = next(iter(answers))
    exact = "plain-ieee" if "plain-ieee" in answers else base
    flop = flop_per_frame(options.card, size, options.renditions)
    many = count * options.passes
    return {
        "card": options.card,
        "size": size,
        "batch": count,
        "passes": options.passes,
        "renditions": bool(options.renditions),
        "base": base,
        "gflop_per_frame": flop / 1e9,
        "contenders": {
            name: summary((name, base, exact), first, rounds, many, flop) for name in answers
        },
    }  # fmt: skip


def summary(
    names: tuple[str, str, str],
    first: dict[str, Any],
    rounds: list[dict[str, Any]],
    count: int,
    flop: float,
) -> dict[str, Any]:
    """names: of the contender, of the one it is faster than, of the one its scores differ from."""
    name, base, exact = names

    def ratio(key: str) -> float:
        return statistics.median(r[base][key] / r[name][key] for r in rounds)

    pairs = zip(first[name]["scores"], first[exact]["scores"], strict=True)
    ms = statistics.median(r[name]["ms"] for r in rounds) / count
    return {
        "ms_per_frame_median": ms,
        "frames_per_s": 1e3 / ms,
        "gflop_per_s": flop / ms / 1e6,
        "ms_per_frame_least": min(r[name]["ms"] for r in rounds) / count,
        "cpu_ms_per_frame_least": min(r[name]["cpu_ms"] for r in rounds) / count,
        "times_faster": ratio("ms"),
        "times_faster_cpu": ratio("cpu_ms"),
        "first_call_ms": first[name]["ms"],
        "peak_mb": max(r[name]["peak_mb"] for r in [first, *rounds]) - first[name]["held_mb"],
        "largest_difference": max(abs(a - b) for a, b in pairs),
        "rounds_ms": [r[name]["ms"] for r in rounds],
        "rounds_cpu_ms": [r[name]["cpu_ms"] for r in rounds],
    }


def flop_per_frame(card: str, size: str, renditions: int) -> float:
    """Floating-point operations, two for a multiplication and its sum, of one frame or pair.

    Of renditions of one reference, by the rendition. Nothing is computed: shapes are enough.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from topiq_core import cards
    from topiq_core.cfanet import CFANet
    from topiq_core.inference import InferenceNet

    known, _ = cards.find(card)
    width, height = map(int, size.split("x"))
    if known.short_side:
        height, width = cards.resized(height, width, known.short_side)
    with torch.device("meta"), torch.inference_mode():
        net = InferenceNet(CFANet(known.architecture)).to("meta")
        image = torch.zeros(max(1, renditions), 3, height, width)
        with FlopCounterMode(display=False) as counter:
            if known.architecture.mode == "nr":
                net(image)
            elif renditions:
                net(image, list(net.levels(image[:1])))
            else:
                net(image, image)
    return counter.get_total_flops() / max(1, renditions)


def gpu_rates() -> dict[str, float]:
    """What the GPU reaches: bf16 products in TFLOP/s, copies in GB/s (read and written)."""
    side, times = 8192, 20
    a = torch.randn(side, side, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(a)

    def seconds(work: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(3):
            work()
        start.record()
        for _ in range(times):
            work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / times

    return {
        "bf16_tflop_per_s": 2 * side**3 / seconds(lambda: torch.mm(a, a, out=out)) / 1e12,
        "copy_gb_per_s": 2 * a.nbytes / seconds(lambda: out.copy_(a)) / 1e9,
    }


def save_frames(path: Path, size: str, count: int, one_reference: bool) -> Path:
    from golden.parameters import noisy, picture

    width, height = map(int, size.split("x"))
    reference = [picture(0 if one_reference else i, height, width) for i in range(count)]
    distorted = [noisy(frame, i) for i, frame in enumerate(reference)]
    np.savez(path, distorted=np.stack(distorted), reference=np.stack(reference))
    return path


def made_weights(card: str, folder: Path) -> str | None:
    """A checkpoint in the published layout for a card that is not bundled."""
    from golden.parameters import fill

    from topiq_core.cards import PUBLISHED
    from topiq_core.cfanet import CFANet

    if card not in PUBLISHED:
        return None
    path = folder / f"{card}.pth"
    torch.save({"params": fill(CFANet(PUBLISHED[card].architecture)).state_dict()}, path)
    return str(path)


def machine(options: argparse.Namespace) -> dict[str, Any]:
    cpu, flags = platform.processor(), ""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else []:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            cpu = value.strip()
        if key.strip() == "flags":
            flags = value
    gpu: dict[str, Any] = {}
    if options.device == "cuda":
        gpu = {
            "gpu": torch.cuda.get_device_name(),
            "gpu_memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **gpu_rates(),
        }
    return gpu | {
        "cpu": cpu,
        "isa": [flag for flag in FLAGS if flag in flags.split()],
        "cores": os.cpu_count(),
        "threads": options.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_average_before": os.getloadavg(),
    }


def share(found: dict[str, Any], rate: float | None) -> str:
    """GFLOP/s, and which part of a GPU's measured bf16 rate that is."""
    part = f" ({found['gflop_per_s'] / rate / 1e3:.0%})" if rate else ""
    return f"{found['gflop_per_s']:.0f}{part}"


def as_rows(result: dict[str, Any], rate: float | None) -> Iterator[str]:
    """Lines of a Markdown table. rate: of a GPU, in bf16, TFLOP/s."""
    for name, r in result["contenders"].items():
        yield (
            f"| {result['card']} | {result['size']} | {result['batch']} | {name} "
            f"| {r['ms_per_frame_median']:.4g} | {r['ms_per_frame_least']:.4g} "
            f"| {r['cpu_ms_per_frame_least']:.4g} | {share(r, rate)} | {r['times_faster']:.2f} "
            f"| {r['times_faster_cpu']:.2f} | {r['peak_mb']:.0f} | {r['first_call_ms']:.0f} "
            f"| {r['largest_difference']:.1e} |"
        )


def main() -> None:
    """Parse, compare, print, and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--card", default="topiq_nr")
    parser.add_argument("--weights", help="a checkpoint; else bundled or made")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--sizes", default="512x384,1024x768")
    parser.add_argument("--batches", default="1")
    parser.add_argument("--precisions", default="fp32")
    parser.add_argument("--renditions", type=int, default=0, help="of one reference, at once")
    parser.add_argument("--passes", type=int, help="batches in a call; 1, on a GPU 8")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--pyiqa", help="python of an environment that has pyiqa")
    parser.add_argument("--json", type=Path, help="where to keep all figures")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.passes = options.passes or (8 if options.device == "cuda" else 1)
    if options.serve:
        serve(options)
        return
    columns = ["card", "size", "frames", "contender", "ms (median)", "ms (least)"]
    columns += ["CPU ms (least)", "GFLOP/s", "times faster", "by CPU time", "peak MB"]
    columns += ["first call ms", "score differs by"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    report: dict[str, Any] = {"machine": machine(options), "results": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        options.weights = options.weights or made_weights(options.card, folder)
        for size in options.sizes.split(","):
            for batch in map(int, options.batches.split(",")):
                result = compare(options, folder, size, batch)
                report["results"].append(result)
                rate = report["machine"].get("bf16_tflop_per_s")
                print("\n".join(as_rows(result, rate)), flush=True)
                if options.json:
                    options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
