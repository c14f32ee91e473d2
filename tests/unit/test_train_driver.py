"""Workers may fail a few times in each round, not in the whole run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import TrainingFailedError
from tiny import tiny_config

from actors import train_driver
from actors.train_driver import TrainDriver
from rlsf_ray.run_store import RunStore
from rlsf_ray.storage import Storage


@pytest.mark.parametrize("ends", [[1, 2, 3], [1, 1]])
def test_training_goes_on_as_long_as_rounds_end(tmp_path: Path, monkeypatch: Any, ends: list[int]) -> None:
    """`ends`: the rounds that are over when each call fails; the last of three returns."""
    store = RunStore.create_or_resume(str(tmp_path), tiny_config(tmp_path, rounds=4))
    driver, calls = TrainDriver(SimpleNamespace(enter=lambda name: store, run="run"), "train_driver"), list[int]()  # type: ignore[arg-type]

    def fit() -> None:
        calls.append(ends[len(calls)])
        store.write_json("state.json", {"ended": [[round, round + 1] for round in range(calls[-1])]})
        if len(calls) < 3:
            raise TrainingFailedError("a worker died")

    monkeypatch.setattr(train_driver, "LAG_S", 0.0)
    monkeypatch.setattr(driver, "_trainer", lambda store: SimpleNamespace(fit=fit))
    if ends == [1, 2, 3]:
        driver.fit()
    else:
        with pytest.raises(TrainingFailedError, match="a worker died"):
            driver.fit()
    assert calls == ends


@pytest.mark.parametrize(("left", "found"), [(b"", b'{"a": 1}'), (b'{"a"', b'{"a": 1}'), (b'{"b": 2}', b'{"b": 2}')])
def test_a_list_of_checkpoints_that_a_crash_cut_short_is_taken_from_its_copy(
    tmp_path: Path, left: bytes, found: bytes
) -> None:
    storage, index = Storage(str(tmp_path)), "checkpoints/run/checkpoint_manager_snapshot.json"
    storage.write(index, b'{"a": 1}')
    train_driver.keep_index(storage, "run")
    storage.write(index, left)
    train_driver.mend_index(storage, "run")
    assert storage.read(index) == found


def test_the_first_list_of_checkpoints_cut_short_is_taken_away(tmp_path: Path) -> None:
    storage, index = Storage(str(tmp_path)), "checkpoints/run/checkpoint_manager_snapshot.json"
    train_driver.mend_index(storage, "run")
    storage.write(index, b"")
    train_driver.mend_index(storage, "run")
    assert storage.read(index) is None
