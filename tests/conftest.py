"""Fixtures shared by all tests: a tiny model, and a cache folder and a token for Ray of the test session's own."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
import torch
from tiny import tiny_config, tiny_model

from rlsf_ray import access
from rlsf_ray.config import RunConfig

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
hypothesis.settings.register_profile("any machine", deadline=None)  # a busy one may take a second for one example
hypothesis.settings.load_profile("any machine")
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


@pytest.fixture(scope="session", autouse=True)
def _own_token(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A token for Ray of this session's own, whatever the user has set."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        os.environ.pop(name, None)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(tmp_path_factory.getbasetemp() / "ray" / "auth_token")
    access.own_token()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer model."""
    return tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def config(tiny: Path) -> RunConfig:
    """A run of two rounds over the tiny model."""
    return tiny_config(tiny)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> None:
    """Evaluations are cached by content; tests that use the real model share its converted copy on purpose."""
    if "real_model" not in request.keywords:
        os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.getbasetemp() / "cache")
    else:
        os.environ.pop("XDG_CACHE_HOME", None)
