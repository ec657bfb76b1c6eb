"""Whether models order the qualities of encoding ladders.

    python benchmarks/ladders.py [--model CARD,CARD] [--frames N] [--codecs NAME,NAME]
        [--json FILE] SOURCE...

Encodes every source (an image, or the first N frames of a video) by x264, x265 and SVT-AV1, or some
of them, at six qualities each, scores the renditions against the source with every model, and
reports Spearman's correlation of score with quality for each ladder: 1 means that every rendition
is in its place.
Full-reference models also have to give the source itself the highest score.
"""

import argparse
import csv
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

import av
import duckdb
import numpy as np
from machine import described
from PIL import Image
from scipy import stats

from jobs.sample_media import RGB, encode
from pipeline import run
from pipeline.config import Config

# Constant rate factors, from hardly visible to bad; those of SVT-AV1 go to 63.
CODECS = {
    "libx264": ((18, 23, 28, 33, 38, 43), {"preset": "medium"}),
    "libx265": ((18, 23, 28, 33, 38, 43), {"preset": "fast", "x265-params": "log-level=0"}),
    "libsvtav1": ((20, 29, 38, 46, 54, 62), {"preset": "8"}),
}


def pictures(source: Path, count: int) -> list[RGB]:
    """An image, or the first frames of a video, with even sides."""
    try:
        with Image.open(source) as image:
            found = [np.asarray(image.convert("RGB"))]
    except OSError:
        found = []
        with av.open(str(source)) as container:
            for frame in container.decode(video=0):
                found.append(frame.to_ndarray(format="rgb24"))
                if len(found) == count:
                    break
    height, width = (side // 2 * 2 for side in found[0].shape[:2])
    return [np.ascontiguousarray(picture[:height, :width]) for picture in found]


def make(sources: list[Path], count: int, codecs: list[str], folder: Path) -> Path:
    """Encode all ladders; the manifest of their pairs."""
    manifest = folder / "pairs.csv"
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["uri", "reference_uri", "ladder", "crf"])
        for number, source in enumerate(sources):
            frames = pictures(source, count)
            # What the encoders are given: 4:2:0, and no loss after that.
            reference = encode(
                folder / f"{number}.mkv", frames, "libx264", options={"qp": "0", "preset": "fast"}
            )
            writer.writerow([reference, reference, f"{source.stem} itself", 0])
            for codec in codecs:
                factors, options = CODECS[codec]
                if len(frames) == 1:  # x265 would give it a decoding time from memory never set
                    options = options | {"bf": "0"}
                for crf in factors:
                    path = folder / f"{number}-{codec}-{crf}.mkv"
                    encode(path, frames, codec, options=options | {"crf": str(crf)}, gop=48)
                    writer.writerow([path, reference, f"{source.stem} {codec}", crf])
    return manifest


def report(out: Path) -> dict[str, dict[str, float]]:
    """Prints a line for each ladder and model, and the medians. By model, ladder: Spearman."""
    rows = duckdb.sql(
        f"SELECT model, ladder, crf, reference_uri, score FROM '{out}/scores/*.parquet'"
    ).fetchall()
    found: dict[str, dict[str, float]] = defaultdict(dict)
    models = sorted({model for model, *_ in rows})
    for model in models:
        points = defaultdict(list)
        by_reference = defaultdict(list)
        for _, ladder, crf, reference, score in (row for row in rows if row[0] == model):
            by_reference[reference].append((score, crf))
            if crf:
                points[ladder].append((crf, score))
        for ladder, values in sorted(points.items()):
            factors, scores = zip(*values, strict=True)
            found[model][ladder] = float(-stats.spearmanr(factors, scores).statistic)
        best = sum(max(scores)[1] == 0 for scores in by_reference.values())
        each = found[model].values()
        print(
            f"{model}: {len(each)} ladders, Spearman median {statistics.median(each):.3f}, "
            f"lowest {min(each):.3f}; source on top of {best} of {len(by_reference)} references"
        )
    for ladder in sorted(found[models[0]]):
        print("  " + "  ".join(f"{found[m][ladder]:6.3f}" for m in models) + f"  {ladder}")
    return found


def main() -> None:
    """Encode, score, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="cfanet_lite_fr,cfanet_lite_nr")
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--codecs", default=",".join(CODECS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("sources", nargs="+", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = make(options.sources, options.frames, options.codecs.split(","), folder)
        config = Config(model=options.model, sample="uniform:4")
        run.score_catalog(str(manifest), str(folder / "out"), config, lambda *_, **__: None)
        found = report(folder / "out")
    if options.json:
        record = {"machine": described(), "spearman": found}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
