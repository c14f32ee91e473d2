"""The wheel holds both packages with their data and no tests; it installs and imports without any dependency."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What needs the standard library alone. Everything else needs at least pydantic or numpy.
WITHOUT_DEPENDENCIES = (
    "rlsf_ray",
    "rlsf_ray.errors",
    "rlsf_ray.logs",
    "rlsf_ray.choices",
    "rlsf_ray.recipes",
    "actors",
)
HEAVY = ("torch", "ray", "transformers", "peft", "vllm", "reasoning_gym", "matplotlib", "math_verify")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a fresh virtual environment that holds the wheel and nothing else."""
    folder = tmp_path_factory.mktemp("fresh") / "env"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    return python


def test_the_wheel_holds_both_packages_and_every_data_file_and_no_more(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    expected = {
        str(path.relative_to(ROOT))
        for package in ("rlsf_ray", "actors")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert set(names) == expected
    assert {"rlsf_ray/recipes/rlsf.yaml", "rlsf_ray/cli.py", "actors/__init__.py"} <= expected


def test_the_wheel_declares_command_extras_and_python(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata = next(archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    entry_points = next(archive.read(name).decode() for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "rlsf = rlsf_ray.cli:main" in entry_points
    assert {f"Provides-Extra: {extra}" for extra in ("demo", "vllm", "dev")} <= set(metadata.splitlines())
    assert "Requires-Python: <3.14,>=3.11" in metadata
    assert "://" not in "".join(line for line in metadata.splitlines() if line.startswith("Requires-Dist"))


def test_modules_without_dependencies_import_in_a_bare_environment(installed: Path, tmp_path: Path) -> None:
    code = f"import {', '.join(WITHOUT_DEPENDENCIES)}; print(rlsf_ray.__file__)"
    done = subprocess.run([installed, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(installed.parents[1]) in done.stdout  # the wheel's copy, not the source tree's


def test_all_modules_but_the_heavy_ones_import_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    """The wheel's modules with this environment's light packages behind them; a heavy import is made to fail.

    A module that fails only for want of a heavy package is one that needs it; any other failure is a fault.
    """
    site = next((installed.parents[1] / "lib").glob("python*/site-packages"))
    modules = sorted(
        ".".join(path.relative_to(site).with_suffix("").parts)
        for package in ("rlsf_ray", "actors")
        for path in (site / package).rglob("[a-z]*.py")
    )
    code = (
        "import importlib, sys\n"
        f"heavy = {HEAVY!r}\n"
        "sys.modules.update(dict.fromkeys(heavy))\n"  # None in sys.modules: importing it raises ImportError
        f"sys.path.insert(0, {str(site)!r})\n"
        f"for name in {modules!r}:\n"
        "    try:\n"
        "        module = importlib.import_module(name)\n"
        f"        assert module.__file__.startswith({str(site)!r}), module.__file__\n"
        "        print(name)\n"
        "    except ImportError as error:\n"
        "        if (error.name or '').partition('.')[0] not in heavy: raise\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    light = set(done.stdout.split())
    assert {"rlsf_ray.config_loading", "rlsf_ray.plan", "rlsf_ray.cli", "rlsf_ray.run_store"} <= light


def test_recipes_are_found_in_the_installed_wheel(installed: Path, tmp_path: Path) -> None:
    code = (
        "from importlib import resources; print(resources.files('rlsf_ray.recipes').joinpath('rlsf.yaml').read_text())"
    )
    done = subprocess.run([installed, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "signal: disparity" in done.stdout
