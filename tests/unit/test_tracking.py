"""A run's curves in real MLflow (its own file store) and Weights & Biases (offline): each point once, in any life."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
import pytest
import wandb
from tiny import tiny_config
from wandb.proto import wandb_internal_pb2

from rlsf_ray.errors import InputError
from rlsf_ray.run_store import RunStore
from rlsf_ray.tracking import Tracking

STATUS = {"state": "running"}


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    return mlflow.get_tracking_uri()


def run_directory(folder: Path) -> RunStore:
    store = RunStore.create_or_resume(str(folder), tiny_config(folder))
    add(store, 1, 0)
    return store


def add(store: RunStore, step: int, version: int) -> None:
    row = {"time": 1e9 + step, "step": step, "loss": 0.5 / step, "round": 0, "logprob_gap": None}
    store.append_metrics("train", [row])
    metrics = {"sampled_accuracy": 0.1 * version, "cot_max_accuracy": None}
    store.write_json(f"eval/version-{version:04d}.json", {"version": version, "metrics": metrics})


def test_mlflow_has_each_point_once_over_two_lives(tmp_path: Path, uri: str) -> None:
    with closing(Tracking("mlflow", str(tmp_path / "run"), "mine")) as tracking:
        tracking(STATUS)  # the run directory is not there yet
        store = run_directory(tmp_path / "run")
        tracking(STATUS)
        tracking(STATUS)
    add(store, 2, 1)
    with closing(Tracking("mlflow", str(tmp_path / "run"), "mine")) as tracking:
        tracking(STATUS)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("rlsf-ray").experiment_id])
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert run.data.params["loss.beta"] == str(store.config.loss.beta)
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value, m.timestamp) for m in history] == [(1, 0.5, 10**12 + 1000), (2, 0.25, 10**12 + 2000)]
    history = client.get_metric_history(run.info.run_id, "eval/sampled_accuracy")
    assert [(m.step, m.value) for m in history] == [(0, 0.0), (1, 0.1)]
    assert set(run.data.metrics) == {"train/loss", "train/round", "eval/sampled_accuracy"}, "no empty values"


def test_a_tracker_that_fails_loses_nothing(tmp_path: Path, uri: str, caplog: Any, monkeypatch: Any) -> None:
    store = run_directory(tmp_path / "run")
    tracking = Tracking("mlflow", str(tmp_path / "run"), "mine")
    sends = tracking._tracker.send

    def broken(points: Any) -> None:
        raise mlflow.exceptions.MlflowException("no network")

    monkeypatch.setattr(tracking._tracker, "send", broken)
    with caplog.at_level(logging.WARNING):
        tracking(STATUS)
    assert "mlflow takes nothing for now: no network" in caplog.text
    add(store, 2, 1)
    monkeypatch.setattr(tracking._tracker, "send", sends)
    tracking.close()
    assert store.read_json("tracking/mlflow.json")["rows"] == 2


def test_weights_and_biases_have_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    store = run_directory(tmp_path / "run")
    with closing(Tracking("wandb", str(tmp_path / "run"), "mine")) as tracking:
        tracking(STATUS)
        add(store, 2, 1)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows, configs = _records(file)
    assert {"train/at": 2, "train/loss": 0.25, "train/round": 0.0}.items() <= rows[2].items()
    assert [row["eval/sampled_accuracy"] for row in rows if "eval/at" in row] == [0.0, 0.1]
    assert len(rows) == 4
    assert json.loads(configs["loss"])["beta"] == store.config.loss.beta


def _records(file: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows and the config of an offline run."""
    rows, configs = [], {}
    for found in _framed(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(found)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        if record.WhichOneof("record_type") == "run":
            configs |= {item.key: item.value_json for item in record.run.config.update}
    return rows, configs


def _framed(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log behind the file's own 7 bytes: (checksum, length, kind), in blocks of 32 KiB."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def test_nowhere_to_send_to_is_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    with pytest.raises(InputError, match=r"MLflow at file:.* does not answer .*set MLFLOW_TRACKING_URI"):
        Tracking("mlflow", str(tmp_path / "run"), "mine")
    monkeypatch.setattr(wandb.api, "_api_key", None, raising=False)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(InputError, match="wandb login"):
        Tracking("wandb", str(tmp_path / "run"), "mine")
