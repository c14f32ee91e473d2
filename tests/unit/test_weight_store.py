"""Going back, as the plain class that the weight store's actor is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny import tiny_config

from actors import weight_store
from actors.weight_store import WeightStore
from rlsf_ray.run_store import RunStore


def test_what_a_crash_kept_from_being_noted_is_not_made_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions 1 and 2 are noted. Going back to 1 makes 3, which the next life finds; had it noted 3, it makes 4."""
    monkeypatch.setattr(weight_store.ray, "put", lambda value: value)
    config = tiny_config(tmp_path)
    store = RunStore.create_or_resume(str(tmp_path), config)
    for version in (1, 2):
        arrays = {f"layer.lora_{name}.weight": np.full((2, 2), version, np.float32) for name in "AB"}
        store.write_adapter(version, arrays, "model", config)
    job: Any = SimpleNamespace(enter=lambda name: store)

    def life(known: int) -> int:
        made = WeightStore(job, "weight_store")
        made.prepare()
        return made.roll_back(1, 2, 0.0, known)

    assert [life(2), life(2), life(3)] == [3, 3, 4]
    assert store.versions() == [1, 2, 3, 4]
    assert store.read_adapter(3)[1].checksum == store.read_adapter(1)[1].checksum
