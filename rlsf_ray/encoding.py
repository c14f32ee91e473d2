"""What a run writes, as bytes: JSON for programs, event records for TensorBoard."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlsf_ray.records import Json


def to_json(obj: Any, indent: int | None = 2) -> bytes:
    """A JSON text with a line end. Numpy numbers become plain ones; nan and inf become null."""
    return (json.dumps(_plain(obj), indent=indent, allow_nan=False) + "\n").encode()


def _plain(obj: Any) -> Any:
    if isinstance(obj, Mapping):
        return {str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, np.ndarray | np.generic):
        return _plain(obj.tolist())
    if isinstance(obj, list | tuple):
        return [_plain(value) for value in obj]
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    return obj


def to_events(name: str, records: Sequence[Json]) -> bytes:
    """TensorBoard's records for the numbers of each row, at the row's step and time."""
    # Imported here: only the trainer writes curves.
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    for record in records:
        numbers = {key: value for key, value in record.items() if key not in ("time", "step") and _is_number(value)}
        values = [Summary.Value(tag=f"{name}/{key}", simple_value=value) for key, value in numbers.items()]
        event = Event(wall_time=record["time"], step=record["step"], summary=Summary(value=values))
        writer.write(event.SerializeToString())
    return buffer.getvalue()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
