"""Which pool takes how much of the cluster's GPUs, where the config leaves that open, and on which nodes it stands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rlsf_ray.config import RunConfig
from rlsf_ray.errors import InputError

POOLS = ("generators", "scorers", "trainers")
# Shares of one GPU for one actor of each role. vLLM takes its share when it starts; the trainer's peak comes next.
ONE_GPU = {"generators": 0.5, "scorers": 0.1, "trainers": 0.4}
# A node type that offers one of these resources takes the actors of these pools, and no other node does
ROLE_RESOURCES = {"generators": "rlsf_generator", "scorers": "rlsf_generator", "trainers": "rlsf_trainer"}
# What the head node of a cluster that grows offers: nodes for these roles will come; so many GPUs with them
MARKED, MOST_GPUS = "rlsf_marked", "rlsf_gpus"
NO_GPUS = dict.fromkeys(POOLS, 0.0)
Marks = dict[str, dict[str, float]]
BESIDE = 0.1  # of a generator's GPU for a scorer, where the trainers have GPUs of their own


def gpu_shares(config: RunConfig, num_gpus: float) -> dict[str, float]:
    """Logical GPUs of each actor, by pool: as the config says, or shared out if it sets none at all.

    Raises InputError if the pools do not fit the GPUs by themselves, or if vLLM would take a GPU that Ray counts free.
    """
    pools = {name: getattr(config.cluster, name) for name in POOLS}
    if num_gpus < 1 or any(pool.gpus is not None for pool in pools.values()):
        shares = {name: pool.gpus or 0.0 for name, pool in pools.items()}
        if num_gpus >= 1 and config.engine == "vllm" and not shares["generators"]:
            raise InputError(
                "vLLM writes on a GPU where there is one, got cluster.generators.gpus=0; set it (0.5 to share one GPU)"
            )
        return shares
    counts = {name: pool.count for name, pool in pools.items()}
    wide = int(config.engine_args.get("tensor_parallel_size", 1))
    if wide > 1:
        raise InputError(
            f"an engine over {wide} GPUs (tensor_parallel_size) is not placed by itself; set cluster.generators.gpus to"
            f" {wide}, and cluster.scorers.gpus and cluster.trainers.gpus"
        )
    if num_gpus >= counts["generators"] + counts["trainers"] and counts["scorers"] <= counts["generators"]:
        return {"generators": 1.0 - BESIDE, "scorers": BESIDE, "trainers": 1.0}
    if set(counts.values()) == {1}:
        return dict(ONE_GPU)
    sizes = ", ".join(f"{count} {name}" for name, count in counts.items())
    raise InputError(
        f"{sizes} do not fit {num_gpus:g} GPUs by themselves: expected one for each generator and trainer, and no more"
        " scorers than generators; set cluster.<pool>.gpus for each pool"
    )


def grown(resources: Mapping[str, float]) -> dict[str, float]:
    """What a cluster of these resources has once all its nodes have come: Ray does not know, its head node says so."""
    found = dict(resources)
    if found.get(MARKED):
        found |= {role: found.get(role, 1.0) for role in ROLE_RESOURCES.values()}
    if most := found.get(MOST_GPUS):
        found["GPU"] = max(most, found.get("GPU", 0.0))
    return found


def marks(resources: Mapping[str, float]) -> Marks:
    """{pool: what its actors ask for so that they come to the nodes meant for them}; nothing where there are none."""
    return {pool: {name: 0.001} if resources.get(name) else {} for pool, name in ROLE_RESOURCES.items()}


def check_growing_trainers(config: RunConfig, nodes: Iterable[Mapping[str, float]], by: Marks) -> None:
    """Raises InputError if trainers are to grow on one of these nodes, by their resources, that also takes generators.

    Ray Train's elastic policy (2.60) counts all that a node has, whoever holds it: it starts as many workers as would
    fit if the run's other actors were gone, waits a minute for room, and does so again without end.
    """
    trainers = config.cluster.trainers
    takes = lambda node, pool: all(node.get(name) for name in by[pool])  # noqa: E731
    if trainers.at_most > trainers.count and any(
        takes(node, "trainers") and takes(node, "generators") for node in nodes
    ):
        raise InputError(
            f"got cluster.trainers.most={trainers.most} where training workers share nodes with generators, expected"
            " nodes of their own: Ray Train takes what others hold there for free, and waits for room without end;"
            f" start nodes for trainers with the resource {ROLE_RESOURCES['trainers']} and others with"
            f" {ROLE_RESOURCES['generators']} (docs/clusters.md), or leave cluster.trainers.most out"
        )


def placed(config: RunConfig, shares: Mapping[str, float]) -> RunConfig:
    """`config` with these GPUs in its pools."""
    cluster = config.cluster
    pools = {name: getattr(cluster, name).model_copy(update={"gpus": shares[name]}) for name in POOLS}
    return config.model_copy(update={"cluster": cluster.model_copy(update=pools)})
