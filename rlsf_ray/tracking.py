"""A run's curves in MLflow or Weights & Biases. The driver sends them, out of what the run directory holds."""

from __future__ import annotations

import logging
import math
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from rlsf_ray.config import RunConfig
from rlsf_ray.errors import InputError
from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore
from rlsf_ray.storage import Storage
from rlsf_ray.tasks.questions import optional_module

logger = logging.getLogger(__name__)

EVERY_S = 10.0
PROJECT = "rlsf-ray"  # the experiment of MLflow, the project of Weights & Biases
BATCH = 100  # points in a call of MLflow, which takes 1,000 numbers; its texts may have 500 characters
TEXT = 500


class Point(NamedTuple):
    """Numbers with one place on one axis: a step's, or a version's."""

    axis: str  # "train" or "eval"
    at: int
    time: float
    numbers: Mapping[str, float]


class Tracker(Protocol):
    """Where points go."""

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """What its package raises where it cannot take them."""

    def begin(self, run: str, config: RunConfig, known: str | None) -> str:
        """Open a run, or the `known` one again; returns its id."""

    def send(self, points: Sequence[Point]) -> None: ...

    def close(self) -> None: ...


class Tracking:
    """To be called with each status. What cannot be sent is sent later: no such error ends a run."""

    def __init__(self, kind: str, root: str, run: str) -> None:
        """Raises InputError if the package is missing or has nowhere to send to."""
        self._kind, self._root, self._run = kind, root, run
        self._tracker: Tracker = _Mlflow() if kind == "mlflow" else _Wandb()
        self._store: RunStore | None = None
        self._sent: Json = {}  # {"id", "rows": of metrics/train.jsonl, "versions"}
        self._next_s = 0.0

    def __call__(self, status: Json) -> None:
        if time.monotonic() >= self._next_s and Storage(self._root).read("config.yaml") is not None:
            self.send()
            self._next_s = time.monotonic() + EVERY_S

    def close(self) -> None:
        """Send what is left."""
        if Storage(self._root).read("config.yaml") is not None:
            self.send()
        self._tracker.close()

    def send(self) -> None:
        """Send what is new in the run directory; note there what was sent."""
        try:
            store = self._store or self._begin()
            rows, versions = store.read_metrics("train"), store.names("eval")
            new = [name for name in versions if name not in self._sent["versions"]]
            points = [_step(row) for row in rows[self._sent["rows"] :]]
            points += [_version(store.read_json(f"eval/{name}")) for name in new]
            if points:
                self._tracker.send(points)
                self._sent |= {"rows": len(rows), "versions": versions}
                store.write_json(self._file, self._sent)
        except self._tracker.errors as error:
            logger.warning("%s takes nothing for now: %s", self._kind, error)

    def _begin(self) -> RunStore:
        store = RunStore.open(self._root)
        self._sent = store.read_json(self._file) or {"id": None, "rows": 0, "versions": []}
        self._sent["id"] = self._tracker.begin(self._run, store.config, self._sent["id"])
        store.write_json(self._file, self._sent)
        self._store = store
        return store

    @property
    def _file(self) -> str:
        return f"tracking/{self._kind}.json"


def _step(row: Json) -> Point:
    return Point(
        "train", row["step"], row["time"], _numbers({k: v for k, v in row.items() if k not in ("time", "step")})
    )


def _version(evaluation: Json) -> Point:
    return Point("eval", evaluation["version"], time.time(), _numbers(evaluation["metrics"]))


def _numbers(row: Json) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


class _Mlflow:
    def __init__(self) -> None:
        self._id: str | None = None
        self._mlflow = optional_module("mlflow", "pip install 'rlsf-ray[mlflow]'")
        self.errors: tuple[type[Exception], ...] = (self._mlflow.exceptions.MlflowException,)
        try:
            self._client = self._mlflow.MlflowClient()
            found = self._client.get_experiment_by_name(PROJECT)
            self._experiment = found.experiment_id if found else self._client.create_experiment(PROJECT)
        except self.errors as error:
            raise InputError(
                f"MLflow at {self._mlflow.get_tracking_uri()} does not answer as one ({error}); set"
                " MLFLOW_TRACKING_URI to your server"
            ) from error

    def begin(self, run: str, config: RunConfig, known: str | None) -> str:
        entities = self._mlflow.entities
        identity = known or str(self._client.create_run(self._experiment, run_name=run).info.run_id)
        if known is None:
            leaves = [entities.Param(key, value[:TEXT]) for key, value in _leaves(config.model_dump(mode="json"))]
            self._client.log_batch(identity, params=leaves)
        self._client.update_run(identity, status="RUNNING")
        self._id = identity
        return identity

    def send(self, points: Sequence[Point]) -> None:
        metric = self._mlflow.entities.Metric
        numbers = [
            metric(f"{point.axis}/{key}", value, int(1000 * point.time), point.at)
            for point in points
            for key, value in point.numbers.items()
        ]
        for first in range(0, len(numbers), BATCH):
            self._client.log_batch(self._id, metrics=numbers[first : first + BATCH])

    def close(self) -> None:
        try:
            if self._id is not None:
                self._client.set_terminated(self._id)
        except self.errors as error:
            logger.warning("mlflow: the run stays open there: %s", error)


class _Wandb:
    def __init__(self) -> None:
        self._wandb = optional_module("wandb", "pip install 'rlsf-ray[wandb]'")
        self.errors: tuple[type[Exception], ...] = (self._wandb.errors.Error,)
        self._session: Any = None
        if os.environ.get("WANDB_MODE", "online") == "online" and not self._wandb.api.api_key:
            raise InputError("Weights & Biases knows no key of yours; run `wandb login`, or set WANDB_MODE=offline")

    def begin(self, run: str, config: RunConfig, known: str | None) -> str:
        identity = known or f"{run}-{uuid.uuid4().hex[:8]}"
        self._session = self._wandb.init(
            project=PROJECT,
            name=run,
            id=identity,
            resume="allow",
            config=config.model_dump(mode="json"),
            settings=self._wandb.Settings(console="off", silent=True),
        )
        for axis in ("train", "eval"):
            self._session.define_metric(f"{axis}/*", step_metric=f"{axis}/at")
        return identity

    def send(self, points: Sequence[Point]) -> None:
        for point in points:
            numbers = {f"{point.axis}/{key}": value for key, value in point.numbers.items()}
            self._session.log(numbers | {f"{point.axis}/at": point.at})

    def close(self) -> None:
        if self._session is not None:
            self._session.finish()


def _leaves(section: Json, before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(dict(value), f"{before}{key}.")
        else:
            yield f"{before}{key}", str(value)
