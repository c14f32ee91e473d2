"""What the README shows is there: commands and options, the file tree, the configs, the Python."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main
import yaml

from rlsf_ray.algorithms.signals import Distribution, TraceStats
from rlsf_ray.cli import app
from rlsf_ray.config_loading import load_config, recipe_names
from rlsf_ray.wording import METRICS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def blocks(language: str) -> list[str]:
    """Contents of the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)


def rlsf_lines() -> list[str]:
    """What follows `rlsf` or `python -m rlsf_ray` in each line of the shell blocks."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    found = (re.search(r"(?:^|\s)(?:rlsf|python -m rlsf_ray)\s+(.*)", line) for line in lines)
    return [match[1] for match in found if match]


def arguments_of(line: str) -> list[str]:
    """A usage line with its brackets taken off and numbers for N."""
    return shlex.split(re.sub(r"\bN\b", "1", line.replace("]...", "]").replace("[", "").replace("]", "")))


def tree_paths() -> list[str]:
    """Paths of the file tree: two spaces of indent a level, the comment after two spaces or more."""
    (tree,) = (block for block in blocks("text") if block.startswith("Makefile"))
    paths: list[str] = []
    folders: list[str] = []
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders = folders[:depth]
        paths.append("/".join([*folders, name.rstrip("/")]))
        if name.endswith("/"):
            folders.append(name.rstrip("/"))
    return paths


def test_the_readme_shows_every_command() -> None:
    shown = {line.split()[0] for line in rlsf_lines()}
    assert shown == set(COMMANDS)
    table = set(re.findall(r"^\| `(\w+)` \| [a-z`]", TEXT, flags=re.MULTILINE))
    assert set(COMMANDS) <= table


@pytest.mark.parametrize("line", rlsf_lines())
def test_every_command_line_parses(line: str) -> None:
    name, *arguments = arguments_of(line)
    with COMMANDS[name].make_context(name, arguments) as context:  # raises for an unknown option or a missing argument
        assert context.info_name == name


def test_a_wrong_command_line_would_be_noticed() -> None:
    for wrong in ("export RUN --to x", "run rlsf --sett a=b", "export RUN --what everything --to x"):
        name, *arguments = arguments_of(wrong)
        with pytest.raises(Exception, match=r"(?i)missing|no such option|invalid value|is not one of"):
            COMMANDS[name].make_context(name, arguments)


def test_every_path_of_the_file_tree_exists() -> None:
    assert [path for path in tree_paths() if not (ROOT / path).exists()] == []


def test_every_module_recipe_and_template_is_in_the_file_tree() -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for package in ("rlsf_ray", "actors", "benchmarks", "docs")
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".yaml", ".html", ".md", ".png")
    }
    assert "actors/coordinator.py" in files
    assert files - set(tree_paths()) == set()
    assert len(tree_paths()) == len(set(tree_paths()))


def test_every_yaml_block_is_a_valid_run(tmp_path: Path) -> None:
    found = blocks("yaml")
    assert len(found) >= 2
    for block in found:
        file = tmp_path / "my_run.yaml"
        file.write_text(block)
        written = yaml.safe_load(block)
        assert load_config(str(file)).rounds == written.get("rounds", load_config(written["base"]).rounds)


def test_every_import_of_the_python_blocks_exists() -> None:
    modules = []
    for block in blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                modules.append(node.module)
                assert all(hasattr(importlib.import_module(str(node.module)), name.name) for name in node.names)
    assert "rlsf_ray.loop" in modules


def test_the_signal_of_the_readme_gives_one_score_a_trace() -> None:
    (block,) = (block for block in blocks("python") if "def steady" in block)
    names: dict[str, object] = {}
    exec(block, names)
    numbers = np.log(np.array([0.9, 0.5, 0.8], dtype=np.float32))

    def trace(*, finished: bool) -> TraceStats:
        return TraceStats(logprob=numbers, top1=numbers, top2=numbers, span=(1, 3), label=0, finished=finished)

    scores = names["steady"]([trace(finished=True), trace(finished=False)])  # type: ignore[operator]
    assert scores[0] == pytest.approx(0.5)  # the answer's tokens have 0.5 and 0.8
    assert np.isnan(scores[1])


def test_the_readmes_signal_over_the_distribution_asks_for_it() -> None:
    (block,) = (block for block in blocks("python") if "calm" in block)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["calm"].needs == {"distribution"}
    some = np.array([0.25, 2.0, 0.5], dtype=np.float32)
    seen = Distribution(some, some, some, some, some, some, some)

    def trace(*, finished: bool) -> TraceStats:
        return TraceStats(logprob=some, top1=some, top2=some, span=None, label=-1, finished=finished, distribution=seen)

    scores = names["calm"].fn([trace(finished=True), trace(finished=False)])
    assert scores[0] == -2.0
    assert np.isnan(scores[1])


def test_the_recipes_table_names_every_recipe() -> None:
    section = TEXT.partition("\n## Recipes\n")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \| ", section, flags=re.MULTILINE)) == recipe_names()


def test_the_places_for_the_demo_and_the_picture_are_there() -> None:
    (shown,) = re.findall(r"<!-- demo output -->\n```text\n(.+?)\n```\n<!-- end -->", TEXT, flags=re.DOTALL)
    names = [name for key, name, _, _ in METRICS if not key.startswith(("cot_", "unchecked"))]  # not of the demo
    assert all(name in shown for name in names)  # the words that the program prints today
    assert re.search(r"^time \d+ min \d\d s, peak memory of all processes \d+\.\d GB$", shown, flags=re.MULTILINE)
    assert "](docs/report.png)" in TEXT
