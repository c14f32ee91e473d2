"""Models along base + alpha x adapter, and exports of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_config

from rlsf_ray import loop
from rlsf_ray.adapters import from_peft, scaled
from rlsf_ray.errors import InputError
from rlsf_ray.export import export_adapter
from rlsf_ray.mix import mix
from rlsf_ray.run_store import CALIBRATION_FILE, RunStore


@pytest.fixture(scope="module")
def store(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    root = str(tmp_path_factory.mktemp("mix") / "run")
    loop.run(tiny_config(tiny, rounds=1, data={"calibration": 4}), root)
    return RunStore.open(root)


def test_at_zero_it_is_the_base_model_and_at_one_the_version(store: RunStore) -> None:
    seen: list[float] = []
    found = mix(store, 1, [1.0, 0.0, 0.5], seen.append)
    assert [point["alpha"] for point in found["points"]] == seen == [0.0, 0.5, 1.0]
    for point, version in ((found["points"][0], 0), (found["points"][2], 1)):
        measured = store.read_json(f"eval/version-{version:04d}.json")
        assert point["metrics"]["sampled_accuracy"] == measured["metrics"]["sampled_accuracy"]
        assert point["vitals"]["surprisal"] == pytest.approx(measured["vitals"]["surprisal"], rel=1e-5)
    middle = [point["vitals"]["surprisal"] for point in found["points"]]
    assert len(set(middle)) == 3
    assert store.read_json("mix.json")["points"][1]["alpha"] == 0.5


def test_what_an_interrupted_call_has_measured_is_kept(store: RunStore) -> None:
    seen: list[float] = []
    mix(store, 1, [0.0], seen.append)
    mix(store, 1, [0.0, 0.5], seen.append)
    assert len(seen) == len(set(seen))
    found = mix(store, 1, [0.0, 0.5], lambda alpha: pytest.fail("measured twice"))
    assert [point["alpha"] for point in found["points"]] == [0.0, 0.5]


def test_without_a_probe_set_there_is_nothing_to_measure(store: RunStore) -> None:
    blind = RunStore(
        store.storage, store.config.model_copy(update={"data": store.config.data.model_copy(update={"probe": ()})})
    )
    with pytest.raises(InputError, match="no probe set"):
        mix(blind, 1, [0.5], lambda alpha: None)


def test_an_export_is_scaled_and_leaves_the_calibration_behind(store: RunStore, tmp_path: Path) -> None:
    store.write_json(f"versions/0001/{CALIBRATION_FILE}", {"weights": []})
    adapter = store.read_adapter(1)[0]
    for alpha in (1.0, 0.5):
        to = export_adapter(store, 1, tmp_path / str(alpha), alpha)
        found = from_peft((to / "adapter_model.safetensors").read_bytes())
        for name, array in adapter.items():
            np.testing.assert_allclose(found[name], array * (alpha if ".lora_B." in name else 1.0))
        assert (to / CALIBRATION_FILE).exists() == (alpha == 1.0)


def test_at_zero_nothing_is_left_of_numbers_that_are_not_finite() -> None:
    broken = {"a.lora_A.weight": np.ones((2, 2)), "a.lora_B.weight": np.full((2, 2), np.nan)}
    assert (scaled(broken, 0.0)["a.lora_B.weight"] == 0.0).all()
