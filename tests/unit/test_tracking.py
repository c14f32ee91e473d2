"""A run's curves in real MLflow (its own file store) and Weights & Biases (offline): each point once, in any life."""

from __future__ import annotations

import json
import logging
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlflow
import pytest
import wandb
from tiny import tiny_config
from wandb.proto import wandb_internal_pb2

from rlsf_ray import tracking as tracking_module
from rlsf_ray.errors import DrainedError, GuardError, InputError
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
    store.write_json(f"eval/version-{version:04d}.json", {"version": version, "num_questions": 6, "metrics": metrics})


def test_mlflow_has_each_point_once_over_two_lives(tmp_path: Path, uri: str) -> None:
    with Tracking("mlflow", str(tmp_path / "run"), "mine") as tracking:
        tracking(STATUS)  # the run directory is not there yet
        store = run_directory(tmp_path / "run")
        tracking(STATUS)
        tracking(STATUS)
    add(store, 2, 1)
    with Tracking("mlflow", str(tmp_path / "run"), "mine") as tracking:
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
    """Nor does it end the run; what came before the failure is not sent again."""
    store = run_directory(tmp_path / "run")
    monkeypatch.setattr(tracking_module, "EVERY_S", 0.05)
    tracking, batches = Tracking("mlflow", str(tmp_path / "run"), "mine"), list[list[int]]()
    sends = tracking._sink.send

    def failing(points: Any) -> None:
        batches.append([point.at for point in points])
        if len(batches) == 2:
            raise OSError("no network")
        sends(points)

    monkeypatch.setattr(tracking._sink, "send", failing)
    with caplog.at_level(logging.WARNING), tracking:
        tracking(STATUS)
        while len(batches) < 3:
            time.sleep(0.01)
        add(store, 2, 1)
    assert "mlflow takes nothing for now: no network" in caplog.text
    assert batches == [[1], [0], [0], [2], [1]], "a step, a version that failed and came again, both of the next"


def test_a_version_that_is_measured_on_more_questions_is_sent_again(tmp_path: Path, uri: str) -> None:
    store = run_directory(tmp_path / "run")
    for questions, right in ((6, 0.0), (60, 0.5)):
        metrics = {"sampled_accuracy": right}
        store.write_json("eval/version-0000.json", {"version": 0, "num_questions": questions, "metrics": metrics})
        with Tracking("mlflow", str(tmp_path / "run"), "mine") as tracking:
            tracking(STATUS)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("rlsf-ray").experiment_id])
    assert [m.value for m in client.get_metric_history(run.info.run_id, "eval/sampled_accuracy")] == [0.0, 0.5]


def test_a_run_that_is_refused_sends_nothing_and_one_that_fails_says_so(tmp_path: Path, uri: str) -> None:
    store = run_directory(tmp_path / "run")
    with pytest.raises(InputError), Tracking("mlflow", str(tmp_path / "run"), "mine"):
        raise InputError("holds a run with other settings")
    assert store.names("tracking") == []
    for error, outcome in ((DrainedError("later"), "KILLED"), (GuardError("worse"), "FAILED")):
        with suppress(type(error)), Tracking("mlflow", str(tmp_path / "run"), "mine") as tracking:
            tracking(STATUS)
            raise error
        assert mlflow.MlflowClient().get_run(store.read_json("tracking/mlflow.json")["id"]).info.status == outcome


def test_weights_and_biases_have_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    store = run_directory(tmp_path / "run")
    with Tracking("wandb", str(tmp_path / "run"), "mine") as tracking:
        tracking(STATUS)
        add(store, 2, 1)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows, configs = _records(file)
    steps = [(row["train/at"], row["train/loss"], row["train/round"]) for row in rows if "train/at" in row]
    assert steps == [(1, 0.5, 0.0), (2, 0.25, 0.0)]
    assert [(row["eval/at"], row["eval/sampled_accuracy"]) for row in rows if "eval/at" in row] == [(0, 0.0), (1, 0.1)]
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
        if record.WhichOneof("record_type") == "config":
            configs |= {item.key: item.value_json for item in record.config.update}
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
