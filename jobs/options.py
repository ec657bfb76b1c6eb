"""Command-line options that several verbs share, and how they become a Config."""

from pathlib import Path
from typing import Annotated, Any

import typer

Source = Annotated[
    str,
    typer.Argument(
        help="A file, a folder or prefix, a glob, or a manifest (.parquet, .csv, .jsonl, .ndjson "
        "with a `uri` column). Local or any fsspec URL, such as s3://bucket/prefix."
    ),
]
Output = Annotated[str, typer.Option("--output", "-o", help="Output folder or prefix.")]
Model = Annotated[
    str | None,
    typer.Option(help="Card, or a .safetensors file of your own.", show_default="cfanet_lite_nr"),
]
WeightsFile = Annotated[str | None, typer.Option(help="Path or URL of the card's weights.")]
Sample = Annotated[
    str | None,
    typer.Option(help="uniform:N, fps:R, every:K, keyframes or all.", show_default="uniform:16"),
]
Reference = Annotated[str | None, typer.Option(help="The file that every item is compared with.")]
ReferenceRoot = Annotated[
    str | None,
    typer.Option(help="Folder of references: an item goes with the file of its path below it."),
]
Align = Annotated[
    str | None,
    typer.Option(
        help="Which frames are compared: pts, auto (find the offset) or none (number).",
        show_default="pts",
    ),
]
Measures = Annotated[
    str | None,
    typer.Option("--with", help="Classic measures beside the score: psnr,ssim,ms_ssim."),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file of options.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE, any option of docs/configuration.md; repeatable."),
]


def resolve(config_file: Path | None, settings: list[str] | None, **flags: Any) -> Any:
    """The Config of a command line. Raises ConfigError."""
    from pipeline import config

    if flags.get("measures") is not None:
        flags["measures"] = [name.strip() for name in flags["measures"].split(",")]
    return config.load(config_file, settings, flags)
