"""Placement groups of training jobs whose controller has died: Ray frees them only once the driver's job ends, too."""

from __future__ import annotations

from ray import PlacementGroupID
from ray._private.state import state
from ray.core.generated import gcs_pb2
from ray.util import remove_placement_group
from ray.util.placement_group import PlacementGroup

CONTROLLER = "TrainController"  # of Ray Train


def free_left_groups() -> int:
    """Remove them, whichever run they are of: what was placed in them died with the controller. Returns how many."""
    freed = 0
    for row in state._connect_and_get_accessor().get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(row)
        standing = group.state != gcs_pb2.PlacementGroupTableData.REMOVED
        if standing and group.creator_actor_dead and _class_of(group.creator_actor_id) == CONTROLLER:
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
            freed += 1
    return freed


def _class_of(actor_id: bytes) -> str:
    return str(state.actor_table(actor_id.hex()).get("ActorClassName", ""))
