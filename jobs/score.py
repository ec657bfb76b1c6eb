"""`topiq score`: a catalog of media to Parquet scores."""

from typing import TYPE_CHECKING, Annotated

import typer

from jobs import cli, options

if TYPE_CHECKING:
    from pipeline.run import Summary


# Scores of so many items at most are printed: of more, Parquet is the better place.
_SHOWN = 20


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
    device: Annotated[
        str | None, typer.Option(help="auto, cpu or cuda.", show_default="auto")
    ] = None,
    config: options.ConfigFile = None,
    settings: options.Settings = None,
    fail_on_error: Annotated[
        bool | None, typer.Option("--fail-on-error", help="Stop at the first failed item.")
    ] = None,
    max_failures: Annotated[
        int | None, typer.Option(help="Stop when more work units than this have failed.")
    ] = None,
    on_partial: Annotated[
        str | None,
        typer.Option(
            help="Damaged material: score what there is (marked) or fail.", show_default="score"
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per event on stdout.")
    ] = False,
) -> None:
    """Score images and videos: plan/, frame_scores/, failures/, scores/ and run.json in OUTPUT.

    The same command again goes on where it stopped, and scores what is new or has changed.
    Scores of a few items are printed too.
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
    if not as_json and 0 < summary.scored <= _SHOWN:
        _show(summary)
    if summary.failed:
        raise cli.SomeFailed


def _show(summary: "Summary") -> None:
    """Print each item's score and URI, best first; of several models one after the other."""
    from pipeline import aggregate
    from pipeline.output import Output

    models = summary.model.split(",")
    for model in models:
        if len(models) > 1:
            typer.echo(f"{model}:")
        rows = (
            aggregate.scores(Output(summary.output), model).to_table(["score", "uri"]).to_pylist()
        )
        for row in sorted(rows, key=lambda row: -row["score"]):
            typer.echo(f"{row['score']:.3f}  {row['uri']}")


if __name__ == "__main__":
    cli.main("score")
