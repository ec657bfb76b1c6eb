import dataclasses
import re
from pathlib import Path

import pytest

from pipeline import cluster, plan, run, schemas, stages
from pipeline.config import Config
from pipeline.errors import BY_CODE
from pipeline.pooling import DEFAULT_POOLING

DOCS = Path(__file__).parents[2] / "docs"
SCHEMA = (DOCS / "schema.md").read_text(encoding="utf-8")
EVENTS = (DOCS / "events.md").read_text(encoding="utf-8")


def section(text, heading):
    """What stands under a `## heading`, up to the next one of that level."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert found, f"no section '{heading}'"
    return found[1]


def table(text, *header):
    """The cells of the first table with this header, without backticks."""
    lines = iter(text.splitlines())
    assert f"| {' | '.join(header)} |" in lines, f"no table {header}"
    assert re.fullmatch(r"(\|-+)+\|", next(lines))
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
        assert len(rows[-1]) == len(header), line
    return rows


def documented(heading, text=SCHEMA):
    rows = table(section(text, heading), "column", "type", "meaning")
    return [(name, kind) for name, kind, _ in rows]


def arrow(schema):
    return [(field.name, str(field.type)) for field in schema]


def field_names(kind):
    return [field.name for field in dataclasses.fields(kind)]


TABLES = {
    "plan/": schemas.PLAN,
    "frame_scores/ and failures/": schemas.OUTCOME,
    "scores/": schemas.scores(DEFAULT_POOLING, []),
}


@pytest.mark.parametrize("heading", TABLES)
def test_documented_columns_are_those_of_the_schema_in_order_and_type(heading):
    assert documented(heading) == arrow(TABLES[heading])


@pytest.mark.parametrize("heading", TABLES)
def test_a_column_that_is_never_null_is_not_said_to_be_null(heading):
    for name, _, meaning in table(section(SCHEMA, heading), "column", "type", "meaning"):
        if not TABLES[heading].field(name).nullable:
            assert not re.search(r"\bnull\b", meaning, re.I), name


@pytest.mark.parametrize("heading", TABLES)
@pytest.mark.parametrize("edit", ["without a row", "with one more", "of another type", "swapped"])
def test_a_page_that_is_out_of_date_is_noticed(heading, edit):
    page = section(SCHEMA, heading)
    rows = [line for line in page.splitlines() if line.startswith("| `")][:2]
    edited = {
        "without a row": page.replace(rows[0] + "\n", "", 1),
        "with one more": page.replace(rows[0], rows[0] + "\n| `extra` | `string` | New. |", 1),
        "of another type": page.replace("`string`", "`binary`", 1),
        "swapped": page.replace("\n".join(rows), "\n".join(reversed(rows)), 1),
    }[edit]
    assert documented(heading, f"## {heading}\n{edited}") != arrow(TABLES[heading])


def test_documented_fields_of_frame_are_those_of_the_struct_in_order():
    rows = table(section(SCHEMA, "frame_scores/ and failures/"), "field", "meaning")
    names = [name for cell, _ in rows for name in re.findall(r"\w+", cell)]
    assert names == [field.name for field in schemas.FRAME_FORM]


def test_documented_failure_codes_are_all_of_them():
    codes = [code for code, _ in table(section(SCHEMA, "Failure codes"), "code", "meaning")]
    assert codes == sorted(BY_CODE)


def test_documented_fields_of_run_json_are_those_of_the_record():
    names = [name for name, _ in documented("run.json")]
    expected = {
        "cluster": field_names(cluster.Shares),
        "plan": [*field_names(plan.PlanCounts), "seconds"],
        "stages.NAME": field_names(stages.Stage),
    }
    for parent, fields in expected.items():
        inside = [n.removeprefix(f"{parent}.") for n in names if n.startswith(f"{parent}.")]
        assert inside == fields


def test_documented_fields_of_the_last_event_are_those_of_the_summary():
    rows = table(section(EVENTS, "finished"), "field", "type", "meaning")
    assert [name for name, *_ in rows] == field_names(run.Summary)


def test_documented_schema_version_is_the_one_written_into_the_tables():
    assert f"schema version {schemas.SCHEMA_VERSION}" in SCHEMA
    for schema in TABLES.values():
        assert schema.metadata[b"topiq_schema_version"].decode() == schemas.SCHEMA_VERSION


def test_every_name_of_a_table_is_reserved_against_manifests():
    default = schemas.scores(Config().pooling, [])
    assert all(schemas.is_reserved(n) for n in [*schemas.PLAN.names, *default.names])
