"""A run's curves in MLflow or Weights & Biases. The driver sends them, out of what the run directory holds."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from rlsf_ray.config import RunConfig
from rlsf_ray.errors import DrainedError, InputError
from rlsf_ray.records import Json
from rlsf_ray.redaction import redact
from rlsf_ray.run_store import RunStore
from rlsf_ray.storage import Storage
from rlsf_ray.tasks.questions import optional_module

logger = logging.getLogger(__name__)

EVERY_S = 10.0
LAST_S = 30.0  # for what is left when the run has ended
TRY_S, TRIES = 10, 2  # of one request: a dead server must not keep us
PROJECT = "rlsf-ray"  # the experiment of MLflow, the project of Weights & Biases
ROWS = 40  # of a request: MLflow takes 1,000 numbers
TEXT = 500  # characters that MLflow takes for one setting


class Point(NamedTuple):
    """Numbers with one place on one axis: a step's, or a version's."""

    axis: str  # "train" or "eval"
    at: int
    time: float
    numbers: Mapping[str, float]


class Sink(Protocol):
    """Where points go."""

    def begin(self, run: str, known: str | None) -> str:
        """Open a run, or the `known` one again; returns its id."""

    def describe(self, config: RunConfig) -> None: ...

    def send(self, points: Sequence[Point]) -> None: ...

    def end(self, outcome: str) -> None:
        """`outcome`: FINISHED, KILLED (it can be resumed) or FAILED."""


class Tracking:
    """To be called with each status of a run. A thread of its own sends; what it cannot send is sent later.

    A step that was done again after a crash is sent again, as metrics/train.jsonl has it.
    """

    def __init__(self, kind: str, root: str, run: str) -> None:
        """Raises InputError if the package is missing or has nowhere to send to."""
        self._kind, self._root, self._run = kind, root, run
        self._sink: Sink = _Mlflow() if kind == "mlflow" else _Wandb()
        self._store: RunStore | None = None
        self._sent: Json = {}  # {"id", "rows": of metrics/train.jsonl, "versions": {file: questions}}
        self._outcome = "FINISHED"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name=kind, daemon=True)

    def __call__(self, status: Json) -> None:
        """The run is really ours: begin to send."""
        if not self._thread.is_alive() and Storage(self._root).read("config.yaml") is not None:
            self._thread.start()

    def __enter__(self) -> Tracking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Send what is left, within LAST_S."""
        if error is not None:
            self._outcome = "KILLED" if isinstance(error, DrainedError | KeyboardInterrupt) else "FAILED"
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(LAST_S)
            if self._thread.is_alive():
                logger.warning("%s has not taken all yet; the same command sends what is missing", self._kind)

    def _work(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(EVERY_S)
            self._try(self._send)
        self._try(lambda: self._sink.end(self._outcome))

    def _try(self, work: Any) -> None:
        try:
            work()
        except Exception as error:  # of two packages, their networks and the storage: none may end a run
            logger.warning("%s takes nothing for now: %s", self._kind, redact(str(error)))

    def _send(self) -> None:
        """Send what is new in the run directory; note there what was sent."""
        store = self._store or self._begin()
        rows = store.read_metrics("train")
        for first in range(self._sent["rows"], len(rows), ROWS):
            part = rows[first : first + ROWS]
            self._sink.send([_step(row) for row in part])
            self._note(store, rows=first + len(part))
        for name in store.names("eval"):
            evaluation = store.read_json(f"eval/{name}")
            questions = evaluation["num_questions"]
            if questions > self._sent["versions"].get(name, -1):  # a version may be measured again on more
                self._sink.send([_version(evaluation)])
                self._note(store, versions=self._sent["versions"] | {name: questions})

    def _begin(self) -> RunStore:
        store = RunStore.open(self._root)
        self._sent = store.read_json(self._file) or {"id": None, "rows": 0, "versions": {}}
        known = self._sent["id"]
        self._note(store, id=self._sink.begin(self._run, known))
        if known is None:
            self._sink.describe(store.config)
        self._store = store
        return store

    def _note(self, store: RunStore, **sent: Any) -> None:
        self._sent |= sent
        store.write_json(self._file, self._sent)

    @property
    def _file(self) -> str:
        return f"tracking/{self._kind}.json"


def _step(row: Json) -> Point:
    numbers = _numbers({key: value for key, value in row.items() if key not in ("time", "step")})
    return Point("train", row["step"], row["time"], numbers)


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
        self._mlflow = optional_module("mlflow", "pip install 'rlsf-ray[mlflow]'")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(TRIES))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(TRY_S))
        try:
            self._client = self._mlflow.MlflowClient()
            found = self._client.get_experiment_by_name(PROJECT)
            self._experiment = found.experiment_id if found else self._client.create_experiment(PROJECT)
        except self._mlflow.exceptions.MlflowException as error:
            raise InputError(
                redact(f"MLflow at {self._mlflow.get_tracking_uri()} does not answer as one ({error});")
                + " set MLFLOW_TRACKING_URI to your server"
            ) from error

    def begin(self, run: str, known: str | None) -> str:
        self._id = known or str(self._client.create_run(self._experiment, run_name=run).info.run_id)
        self._client.update_run(self._id, status="RUNNING")
        return self._id

    def describe(self, config: RunConfig) -> None:
        param = self._mlflow.entities.Param
        leaves = [param(key, value[:TEXT]) for key, value in _leaves(config.model_dump(mode="json"))]
        self._client.log_batch(self._id, params=leaves)

    def send(self, points: Sequence[Point]) -> None:
        metric = self._mlflow.entities.Metric
        numbers = [
            metric(f"{point.axis}/{key}", value, int(1000 * point.time), point.at)
            for point in points
            for key, value in point.numbers.items()
        ]
        self._client.log_batch(self._id, metrics=numbers)

    def end(self, outcome: str) -> None:
        self._client.set_terminated(self._id, status=outcome)


class _Wandb:
    def __init__(self) -> None:
        self._wandb = optional_module("wandb", "pip install 'rlsf-ray[wandb]'")
        if os.environ.get("WANDB_MODE", "online") == "online" and not self._wandb.api.api_key:
            raise InputError("Weights & Biases knows no key of yours; run `wandb login`, or set WANDB_MODE=offline")

    def begin(self, run: str, known: str | None) -> str:
        identity = known or f"{run}-{uuid.uuid4().hex[:8]}"
        settings = self._wandb.Settings(console="off", silent=True, init_timeout=TRY_S, finish_timeout=TRY_S)
        self._session = self._wandb.init(project=PROJECT, name=run, id=identity, resume="allow", settings=settings)
        for axis in ("train", "eval"):
            self._session.define_metric(f"{axis}/*", step_metric=f"{axis}/at")
        return identity

    def describe(self, config: RunConfig) -> None:
        self._session.config.update(config.model_dump(mode="json"))

    def send(self, points: Sequence[Point]) -> None:
        for point in points:
            numbers = {f"{point.axis}/{key}": value for key, value in point.numbers.items()}
            self._session.log(numbers | {f"{point.axis}/at": point.at})

    def end(self, outcome: str) -> None:
        self._session.finish(exit_code=int(outcome == "FAILED"))
        self._wandb.teardown()  # its own process has written all when this returns


def _leaves(section: Json, before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(dict(value), f"{before}{key}.")
        else:
            yield f"{before}{key}", str(value)
