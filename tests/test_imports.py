"""Dependencies point one way, and nothing heavy is imported before it is needed."""

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def loaded_by(code, *names):
    """Those of `names` that a fresh interpreter has imported after running `code`."""
    report = f"import sys; print(*[name for name in {names!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def modules_of(package):
    """The package and every module in it, by name, without importing any."""
    found = pkgutil.walk_packages([str(ROOT / package)], f"{package}.")
    return [package, *(module.name for module in found)]


def imported_names(path):
    """Full names of every import in a file, also those inside functions and `if TYPE_CHECKING`."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            yield ".".join((*above, *filter(None, [node.module])))


def packages_imported_by(package):
    files = list((ROOT / package).rglob("*.py"))
    assert len(files) > 5
    return {name.partition(".")[0] for path in files for name in imported_names(path)}


def test_the_model_side_runs_without_ray_pyav_and_pyarrow():
    names = modules_of("topiq_core")
    assert {"topiq_core.scorer", "topiq_core.training.loop"} <= set(names)
    code = "\n".join(f"import {name}" for name in names)
    seen = loaded_by(code, "torch", "ray", "av", "pyarrow", "duckdb", "pipeline", "jobs")
    assert seen == {"torch"}


def test_the_scorer_alone_imports_no_training_and_no_compiler():
    """Each scorer of a run waits for it. Importing torchvision imports torch's compiler."""
    slow = ("topiq_core.training", "scipy", "torchvision", "torch._dynamo")
    seen = loaded_by("import topiq_core.scorer", "topiq_core.scorer", *slow)
    assert seen == {"topiq_core.scorer"}


@pytest.mark.parametrize("module", ["topiq_core", "topiq_core.cards", "topiq_core.weights"])
def test_cards_and_weights_are_found_without_torch(module):
    assert loaded_by(f"import {module}", "topiq_core", "torch") == {"topiq_core"}


@pytest.mark.parametrize("module", ["pipeline.score", "pipeline.run"])
def test_the_driver_does_not_import_torch(module):
    """Decode workers import what the driver does; torch would cost each a second and 300 MB."""
    assert loaded_by(f"import {module}", module, "torch") == {module}


def test_the_command_line_is_built_without_anything_heavy():
    heavy = ("ray", "torch", "duckdb", "pyarrow", "av", "numpy")
    code = "import jobs.cli; jobs.cli.application()"
    assert loaded_by(code, "jobs.score", *heavy) == {"jobs.score"}


def test_the_model_side_imports_neither_pipeline_nor_jobs():
    imported = packages_imported_by("topiq_core")
    assert "torch" in imported
    assert not imported & {"pipeline", "jobs", "ray", "av", "pyarrow"}


def test_the_pipeline_does_not_import_jobs():
    imported = packages_imported_by("pipeline")
    assert "topiq_core" in imported
    assert "jobs" not in imported
