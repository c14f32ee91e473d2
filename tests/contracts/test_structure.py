"""The shape of the source: who may import what, how long a function and a file may be, what loads without weight."""

import ast
import os
import pickle
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlsf_ray import errors

ROOT = Path(__file__).parents[2]
FOLDERS = ("rlsf_ray", "actors", "benchmarks", "tests")
MAX_FUNCTION, MAX_FILE = 60, 400  # lines
LIGHT = (
    "rlsf_ray",
    "rlsf_ray.config",
    "rlsf_ray.config_loading",
    "rlsf_ray.errors",
    "rlsf_ray.records",
    "rlsf_ray.logs",
    "rlsf_ray.choices",
    "rlsf_ray.stream",
    "rlsf_ray.cli",
    "rlsf_ray.plan",
    "rlsf_ray.progress",
    "rlsf_ray.model_check",
    "actors",
)
HEAVY = ("torch", "ray", "transformers", "vllm")


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_the_search_for_sources_finds_them() -> None:
    assert {"rlsf_ray/cli.py", "tests/contracts/test_structure.py"} <= {str(p.relative_to(ROOT)) for p in sources()}


def test_no_function_is_longer_than_60_lines() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in sources()
        for node in functions(ast.parse(path.read_text()))
        if node.end_lineno is not None and node.end_lineno - node.lineno + 1 > MAX_FUNCTION
    ]
    assert long == []


def test_no_file_is_longer_than_400_lines() -> None:
    assert [str(p.relative_to(ROOT)) for p in sources() if len(p.read_text().splitlines()) > MAX_FILE] == []


def test_package_init_files_import_nothing() -> None:
    importing = [
        str(path.relative_to(ROOT))
        for path in sources()
        if path.name == "__init__.py"
        and any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(ast.parse(path.read_text())))
    ]
    assert importing == []


def test_there_is_no_init_file_under_tests() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_ray_remote_appears_in_spawn_only() -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in sources()
        if path.parts[-2] in ("actors", "rlsf_ray")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr == "remote"
        and isinstance(node.value, ast.Name)
        and node.value.id == "ray"
    }
    assert users <= {"actors/spawn.py"}


def test_the_import_contracts_hold() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_every_module_has_its_place_in_the_layers() -> None:
    """What import-linter's `exhaustive` would say; it wants a single container, and the layers span two packages."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    placed = {name.strip() for layer in layers for name in layer.split("|")}
    found = {
        f"rlsf_ray.{path.stem}"
        for path in (ROOT / "rlsf_ray").iterdir()
        if path.name not in ("__init__.py", "__pycache__") and (path.is_dir() or path.suffix == ".py")
    } | {"actors"}
    assert found == placed


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_module_of_stream_loads_nothing_heavy() -> None:
    names = [f"rlsf_ray.stream.{path.stem}" for path in (ROOT / "rlsf_ray" / "stream").glob("[a-z]*.py")]
    code = f"import sys, {', '.join(names)}; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert names
    assert done.stdout == "[]\n"


def test_every_error_survives_pickling_with_class_message_and_exit_code() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    assert errors.InputError in classes
    for kind in classes:
        assert issubclass(kind, errors.RlsfError)
        back = pickle.loads(pickle.dumps(kind("what happened; the cure")))
        assert (type(back), str(back), back.exit_code) == (kind, "what happened; the cure", kind.exit_code)


def test_records_for_training_have_no_field_for_a_gold_answer() -> None:
    """Rule 10. Only `ProbePrompt` has one, and no other record holds a `ProbePrompt`."""
    import dataclasses

    from rlsf_ray import records

    kinds = [value for value in vars(records).values() if dataclasses.is_dataclass(value)]
    with_gold = {kind.__name__ for kind in kinds if "gold" in {field.name for field in dataclasses.fields(kind)}}
    assert with_gold == {"ProbePrompt"}
    types = {str(field.type) for kind in kinds for field in dataclasses.fields(kind)}
    assert not [text for text in types if "ProbePrompt" in text]
