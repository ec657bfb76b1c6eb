"""`make demo`: make a small catalog, score it with the bundled model, print the table."""

import shutil
import sys
from pathlib import Path

import duckdb
from rich.console import Console
from rich.table import Table

from jobs.console import Events
from pipeline import run
from pipeline.config import Config


def main(folder: Path = Path("demo")) -> None:
    """Make and score the catalog below `folder`; what is there already is kept."""
    from jobs.sample_media import demo_catalog

    catalog, out = folder / "catalog", folder / "out"
    if not catalog.exists():
        partial = folder / "catalog.partial"
        shutil.rmtree(partial, ignore_errors=True)
        demo_catalog(partial)
        partial.rename(catalog)
    events = Events(as_json=False)
    summary = run.score_catalog(str(catalog), str(out), Config(sample="uniform:4"), events)

    scores = out / "scores" / f"{summary.model}.parquet"
    query = f"""
        SELECT parse_filename(uri), codec, width, height, n_frames, size_bytes // 1024, score
        FROM '{scores}' ORDER BY score DESC
    """
    table = Table(title="best first")
    for name in ("file", "codec", "size", "frames", "KiB", "score"):
        table.add_column(name, justify="left" if name in ("file", "codec") else "right")
    for name, codec, width, height, frames, size, score in duckdb.sql(query).fetchall():
        table.add_row(name, codec, f"{width}x{height}", str(frames), str(size), f"{score:.3f}")
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    failed = f"SELECT parse_filename(uri), code FROM '{out}/failures/*.parquet'"
    for name, code in duckdb.sql(failed).fetchall():
        console.print(f"not scored: {name} ({code})")
    console.print(f"Parquet: {scores}", soft_wrap=True)


if __name__ == "__main__":
    main()
