"""Which actors stand on nodes that are about to go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray


def leaving(handles: Mapping[str, Any]) -> list[str]:
    """Names of the actors on nodes that Ray drains: spot machines that were told so, or idle ones it gives back.

    Ray has no public way to ask this; Ray Train reads the same table.
    """
    draining = ray._private.state.state.get_draining_nodes()
    if not draining:
        return []
    tables = {name: ray._private.state.actors(handle._actor_id.hex()) for name, handle in list(handles.items())}
    return [name for name, table in tables.items() if table and table["Address"]["NodeID"] in draining]
