"""The run directory: everything a run keeps, readable at every moment and enough to go on after a crash.

config.yaml packages.json state.json summary.json report.html
traces/ groups/ pairs/            round-0003/part-00007.parquet
versions/0001/                    one adapter in PEFT format; version.json is written last and makes it count;
                                  calibration.json: its map from one trace to a confidence; trained.json (of the
                                  service): the checksum of what it was trained from, how often on which examples
metrics/*.jsonl  tensorboard/  eval/version-0001.json  checkpoints/ (Ray Train's own)
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError

from rlsf_ray import adapters, tables
from rlsf_ray.adapters import checksum
from rlsf_ray.config import RunConfig
from rlsf_ray.encoding import to_events, to_json
from rlsf_ray.errors import InputError, WeightsError
from rlsf_ray.kept_config import SCHEMA, check_schema, differences, packages, read_config, with_defaults
from rlsf_ray.records import Json, WeightsVersion
from rlsf_ray.storage import Storage, damaged
from rlsf_ray.tables import group_to_row, pair_rows, row_to_group, rows_to_outcome, trace_rows

__all__ = ["RunStore", "checksum", "group_to_row", "pair_rows", "row_to_group", "rows_to_outcome", "trace_rows"]

logger = logging.getLogger(__name__)

CALIBRATION_FILE, TRAINED_FILE = "calibration.json", "trained.json"


class RunStore:
    """One run's files. Make one with `create_or_resume` or `open`; it pickles, and each process may hold its own."""

    trace_rows = staticmethod(trace_rows)
    pair_rows = staticmethod(pair_rows)
    group_to_row = staticmethod(group_to_row)
    row_to_group = staticmethod(row_to_group)

    def __init__(self, storage: Storage, config: RunConfig) -> None:
        self.storage = storage
        self.config = config
        self._events_name = ""

    @classmethod
    def create_or_resume(cls, root: str, config: RunConfig) -> RunStore:
        """The run at `root` with exactly this config, made if it is not there yet.

        Raises `InputError` that names every differing key if another config lies there.
        """
        storage = Storage(root)
        check_schema(storage)
        ours = config.model_dump(mode="json")
        theirs = with_defaults(read_config(storage) or cls._begin(storage, ours))
        if theirs != ours:
            raise InputError(
                f"{storage.root} holds a run with other settings:\n{differences(theirs, ours)}\n"
                "give this run another --run name, or give the same settings to resume that one"
            )
        return cls(storage, config)

    @staticmethod
    def _begin(storage: Storage, ours: Json) -> Json:
        """Write the config, unless another process has done so meanwhile; returns the one that counts."""
        with storage.lock(".config.lock") if storage.local else nullcontext():
            theirs = read_config(storage)
            if theirs is None:
                storage.write("packages.json", to_json({"schema": SCHEMA} | packages()))
                storage.write("config.yaml", yaml.safe_dump(ours, sort_keys=False).encode())
            return theirs or ours

    @classmethod
    def open(cls, root: str) -> RunStore:
        """An existing run. Raises `InputError` if there is none."""
        storage = Storage(root)
        check_schema(storage)
        values = read_config(storage)
        if values is None:
            raise InputError(f"no run at {storage.root}: expected a config.yaml there; check the run's name or path")
        try:
            return cls(storage, RunConfig.model_validate(values))
        except ValidationError as error:
            raise InputError(
                f"{storage.path('config.yaml')} is not a config of this version of rlsf-ray: {error}; open the run"
                " with the version in its packages.json"
            ) from error

    @property
    def root(self) -> str:
        """Absolute path or URL of the run."""
        return self.storage.root

    def path(self, name: str) -> str:
        """Absolute path or URL of one file of the run."""
        return self.storage.path(name)

    def names(self, folder: str) -> list[str]:
        """What lies in a folder of the run, sorted."""
        return self.storage.names(folder)

    def write_text(self, name: str, text: str) -> str:
        """Put a text file in place; returns its full path."""
        self.storage.write(name, text.encode())
        return self.path(name)

    def write_json(self, name: str, obj: Any) -> None:
        """Put a JSON file in place. Numpy numbers become plain ones; nan and inf become null."""
        self.storage.write(name, to_json(obj))

    def read_json(self, name: str) -> Any:
        """The content of a JSON file, None where there is none. Raises `StorageError` if it is damaged."""
        data = self.storage.read(name)
        if data is None:
            return None
        try:
            return json.loads(data)
        except ValueError as error:
            needed = name == "state.json" or name.startswith(("versions/", "reward/"))
            raise damaged(self.path(name), error, needed=needed) from error

    def write_table(self, kind: str, round: int, part: int, rows: Sequence[Json]) -> None:
        """Put one part of a table in place (see tables.py for the kinds and their columns)."""
        self.storage.write(f"{kind}/round-{round:04d}/part-{part:05d}.parquet", tables.encode(kind, rows))

    def read_table(self, kind: str, round: int | None = None) -> Any:
        """The `pyarrow.Table` of one round, or of all, in the order of rounds and parts."""
        folders = self.names(kind) if round is None else [f"round-{round:04d}"]
        files = [f"{kind}/{folder}/{name}" for folder in folders for name in self.names(f"{kind}/{folder}")]
        return tables.concat(kind, [self._read_part(name) for name in files if name.endswith(".parquet")])

    def drop_rounds(self, most_gb: float, ended: int) -> list[int]:
        """Remove the tables of the oldest rounds until they take at most so much; returns these rounds.

        Of the `ended` rounds that are over the newest stays, and all that come after it.
        """
        kinds = ("pairs", "groups", "traces")  # in this order: where it is cut off, the round is still found
        folders = {round: [f"{kind}/round-{round:04d}" for kind in kinds] for round in self.rounds("traces")}
        sizes = {round: sum(map(self.storage.size, names)) for round, names in folders.items()}
        dropped, total = list[int](), sum(sizes.values())
        for round in sorted(sizes):
            if total <= most_gb * 1e9 or round >= ended - 1:
                break
            for name in folders[round]:
                self.storage.remove(name)
            total -= sizes[round]
            dropped.append(round)
        return dropped

    def rounds(self, kind: str) -> list[int]:
        """The rounds that a table has parts of, in order."""
        return [int(name.removeprefix("round-")) for name in self.names(kind) if name.startswith("round-")]

    def _read_part(self, name: str) -> Any:
        try:
            return tables.decode(self.storage.read(name) or b"")
        except ValueError as error:
            raise damaged(self.path(name), error, needed=True) from error

    def append_metrics(self, name: str, records: Sequence[Json]) -> None:
        """Add rows to `metrics/<name>.jsonl`, and those of `train` to TensorBoard. One writer for each name."""
        lines = b"".join(to_json(record, indent=None) for record in records)
        self.storage.append(f"metrics/{name}.jsonl", lines, separator=b"\n")
        if name == "train":
            self._append_events(name, records)

    def read_metrics(self, name: str) -> list[Json]:
        """The rows of `metrics/<name>.jsonl`; a last line that a crash cut short does not count."""
        path = f"metrics/{name}.jsonl"
        whole, _, _ = (self.storage.read(path) or b"").rpartition(b"\n")
        try:
            return [json.loads(line) for line in whole.split(b"\n") if line]
        except ValueError as error:
            raise damaged(self.path(path), error, needed=False) from error

    def _append_events(self, name: str, records: Sequence[Json]) -> None:
        """TensorBoard reads every event file of a folder, so each process and each resume begins a file of its own."""
        if not self._events_name:
            self._events_name = f"tensorboard/events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        self.storage.append(self._events_name, to_events(name, records))

    def write_adapter(
        self, version: int, adapter: Mapping[str, np.ndarray], base_model: str, config: RunConfig
    ) -> WeightsVersion:
        """Keep an adapter under `versions/`. Writing the same content again changes nothing.

        Raises `WeightsError` if the version is known with other content.
        """
        folder = f"versions/{version:04d}"
        made = WeightsVersion(version=version, checksum=checksum(adapter), path=self.path(folder))
        known = self.read_json(f"{folder}/version.json")
        if known is not None:
            if known.get("checksum") != made.checksum:
                raise WeightsError(
                    f"version {version} is already published with other weights: expected checksum"
                    f" {known.get('checksum')}, got {made.checksum}; publish the new weights as a new version"
                )
            return made
        files = adapters.to_peft(adapter, base_model=base_model, lora_alpha=config.learner.lora_alpha)
        for name, data in files.items():
            self.storage.write(f"{folder}/{name}", data)
        self.write_json(f"{folder}/version.json", {"version": version, "checksum": made.checksum})
        return made

    def read_adapter(self, version: int) -> tuple[dict[str, np.ndarray], WeightsVersion]:
        """An adapter and its name. Raises `WeightsError` if it is unknown or no longer what was published."""
        folder = f"versions/{version:04d}"
        known = self.read_json(f"{folder}/version.json")
        if known is None:
            raise WeightsError(f"no version {version} in {self.root}; published are {self.versions()}")
        weights = f"{folder}/{adapters.WEIGHTS_FILE}"
        try:
            adapter = adapters.from_peft(self.storage.read(weights) or b"")
        except ValueError as error:
            raise damaged(self.path(weights), error, needed=True) from error
        found = checksum(adapter)
        if found != known.get("checksum"):
            raise WeightsError(
                f"{self.path(weights)} changed after it was published: expected checksum {known.get('checksum')}, got"
                f" {found}; restore it from a copy"
            )
        return adapter, WeightsVersion(version=version, checksum=found, path=self.path(folder))

    def read_between(self, to: int, past: int | None, share: float) -> dict[str, np.ndarray]:
        """The adapter so far on the way from version `to` (0: the base model) to `past`.

        Raises `WeightsError` if one of them is unknown or no longer what was published.
        """
        near = self.read_adapter(to)[0] if to else adapters.scaled(self.read_adapter(self.versions()[0])[0], 0.0)
        return near if past is None else adapters.between(near, self.read_adapter(past)[0], share)

    def write_reward(self, weights: Mapping[str, np.ndarray], round: int) -> None:
        """Keep the reward model as a round has left it; its record comes last."""
        self.storage.write(f"reward/round-{round:04d}.safetensors", adapters.to_bytes(weights))
        self.write_json(f"reward/round-{round:04d}.json", {"checksum": checksum(weights)})

    def reward_round(self, ended: int) -> int | None:
        """The last of the first `ended` rounds that trained the reward model; None: none did."""
        known = [int(name[6:10]) for name in self.names("reward") if name.endswith(".json")]
        return max((round for round in known if round < ended), default=None)

    def read_reward(self, round: int) -> dict[str, np.ndarray]:
        """The reward model of a round. Raises `WeightsError` if it is not there, or not what was written."""
        known, data = (
            self.read_json(f"reward/round-{round:04d}.json"),
            self.storage.read(f"reward/round-{round:04d}.safetensors"),
        )
        weights = adapters.from_peft(data) if data else {}
        if not known or not weights or checksum(weights) != known["checksum"]:
            raise WeightsError(
                f"{self.path('reward')} holds no whole reward model of round {round}: expected checksum"
                f" {known and known['checksum']}, got {checksum(weights) if weights else 'none'}; restore it from a"
                " copy, or begin a new run"
            )
        return weights

    def write_evaluation(self, evaluation: Json) -> None:
        """Keep what was measured of a version; the map of its confidence also lies beside the adapter."""
        version = evaluation["version"]
        if evaluation["calibration"] is not None:
            self.write_json(f"versions/{version:04d}/{CALIBRATION_FILE}", evaluation["calibration"])
        self.write_json(_evaluation_path(version), evaluation)

    def measured(self, version: int, questions: int) -> Json | None:
        """The evaluation of a version on so many questions or more, None where there is none."""
        found: Json | None = self.read_json(_evaluation_path(version))
        return found if found is not None and found["num_questions"] >= questions else None

    def version_before(self, version: int) -> int | None:
        """The version that `version` was trained from, 0 for the base model, which itself has none before it.

        A version that the guard has made by going back counts as the one to which it went back: moved a little from
        there it would find its own answers again.
        """
        undone = (self.read_json("state.json") or {}).get("rolled_back")
        if undone and version > undone["from"]:
            version = undone["to"]
        return max((one for one in (0, *self.versions()) if one < version), default=None)

    def earlier_answers(self, version: int) -> Json | None:
        """{prompt: answers} of the version before to the calibration prompts, None where there is none."""
        before = self.version_before(version)
        if before is None:
            return None
        found: Json | None = self.read_json(_evaluation_path(before))
        if found is None or "calibration_answers" not in found:
            logger.warning(
                "version %d was not measured by this program, so the confidence of version %d is fitted to its"
                " agreement with itself alone, and may be too high; `rlsf eval` measures it again",
                before,
                version,
            )
            return None
        answers: Json = found["calibration_answers"]
        return answers

    def versions(self) -> list[int]:
        """Published versions, oldest first."""
        folders = [name for name in self.names("versions") if name.isdigit()]
        return [int(name) for name in folders if "version.json" in self.names(f"versions/{name}")]


def _evaluation_path(version: int) -> str:
    return f"eval/version-{version:04d}.json"
