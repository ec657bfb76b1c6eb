"""`topiq score`: a catalog of media to Parquet scores."""

from typing import Annotated

import typer

from jobs import cli, options


def score(
    source: options.Source,
    output: options.Output,
    model: options.Model = None,
    weights: options.WeightsFile = None,
    sample: options.Sample = None,
    reference: options.Reference = None,
    reference_root: options.ReferenceRoot = None,
    align: options.Align = None,
    measures: options.Measures = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    config: options.ConfigFile = None,
    settings: options.Settings = None,
    fail_on_error: Annotated[
        bool | None, typer.Option("--fail-on-error", help="Stop at the first failed item.")
    ] = None,
    max_failures: Annotated[
        int | None, typer.Option(help="Stop when more work units than this have failed.")
    ] = None,
    on_partial: Annotated[
        str | None, typer.Option(help="What becomes of damaged material: score (marked) or fail.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per event on stdout.")
    ] = False,
) -> None:
    """Score images and videos: plan/, frame_scores/, failures/, scores/ and run.json in OUTPUT.

    The same command again goes on where it stopped, and scores what is new or has changed.
    Exit code: 0 all scored, 2 some items failed (see failures/), 1 the run itself failed.
    """
    resolved = options.resolve(
        config,
        settings,
        model=model,
        weights=weights,
        sample=sample,
        device=device,
        reference=reference,
        reference_root=reference_root,
        align=align,
        measures=measures,
        fail_on_error=fail_on_error,
        max_failures=max_failures,
        on_partial=on_partial,
    )
    from jobs.console import Events
    from pipeline import run

    events = Events(as_json)
    try:
        summary = run.score_catalog(source, output, resolved, events)
    finally:
        events.close()
    if summary.failed:
        raise cli.SomeFailed


if __name__ == "__main__":
    cli.main("score")
