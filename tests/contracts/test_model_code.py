"""Every place that loads a model says that Python from its folder must not run: else transformers asks the terminal."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _loads(path: Path) -> list[ast.Call]:
    """Calls like AutoModel.from_pretrained(...)."""
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("from_pretrained", "from_config")
        and ast.unparse(node.func.value).startswith("Auto")
    ]


def test_every_load_switches_remote_code_off() -> None:
    loads = [
        (path, call)
        for package in ("rlsf_ray", "actors")
        for path in (ROOT / package).rglob("*.py")
        for call in _loads(path)
    ]
    assert len(loads) >= 9
    open_ones = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path, call in loads
        if not any(word.arg == "trust_remote_code" and ast.unparse(word.value) == "False" for word in call.keywords)
    ]
    assert open_ones == []
