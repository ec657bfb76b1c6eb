"""`topiq plan`: what a run would do, and how long it would take."""

from pathlib import Path
from typing import Annotated

import typer

from jobs import cli, options


def plan(
    source: options.Source,
    output: options.Output,
    model: options.Model = None,
    weights: options.WeightsFile = None,
    sample: options.Sample = None,
    reference: options.Reference = None,
    reference_root: options.ReferenceRoot = None,
    align: options.Align = None,
    measures: options.Measures = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Say how long scoring would take.")
    ] = False,
    gpus: Annotated[int, typer.Option(min=1, help="Devices to estimate for.")] = 1,
    speed_from: Annotated[
        Path | None,
        typer.Option(
            help="run.json of an earlier run on the hardware in question; without it, the model "
            "is measured on this machine."
        ),
    ] = None,
    config: options.ConfigFile = None,
    settings: options.Settings = None,
) -> None:
    """Write plan/ only: list the catalog, probe every item, choose the frames to score."""
    resolved = options.resolve(
        config,
        settings,
        model=model,
        weights=weights,
        sample=sample,
        reference=reference,
        reference_root=reference_root,
        align=align,
        measures=measures,
    )
    from jobs.console import Events
    from pipeline import estimate as estimates
    from pipeline import run

    events = Events(as_json=False)
    planned, left = run.plan_catalog(source, output, resolved, events)
    if estimate:
        if speed_from is not None:
            speed = estimates.speed_of_run(speed_from)
        else:
            speed = estimates.measured_speed(resolved)
        typer.echo(estimates.describe(planned, left, speed, gpus))


if __name__ == "__main__":
    cli.main("plan")
