"""GPUs that the config leaves open are shared out, and what a config sets stays."""

from __future__ import annotations

import pytest

from rlsf_ray.config_loading import load_config
from rlsf_ray.errors import InputError
from rlsf_ray.placement import NO_GPUS, ONE_GPU, check_growing_trainers, gpu_shares, grown, marks, placed
from rlsf_ray.plan import missing_resources, needed_resources


def test_without_a_gpu_nothing_takes_one() -> None:
    assert gpu_shares(load_config("rlsf"), 0.0) == NO_GPUS


def test_on_one_gpu_all_three_stand_side_by_side_and_fit() -> None:
    config = load_config("rlsf")
    shares = gpu_shares(config, 1.0)
    assert shares == ONE_GPU
    together = placed(config, shares)
    assert needed_resources(together)["GPU"] == pytest.approx(1.0)
    assert missing_resources(together, {"CPU": 8.0, "GPU": 1.0}) == []


def test_with_more_gpus_trainers_have_their_own_and_scorers_stand_beside_generators() -> None:
    config = load_config("rlsf", ["cluster.generators.count=2", "cluster.scorers.count=2", "cluster.trainers.count=2"])
    shares = gpu_shares(config, 4.0)
    assert shares == {"generators": 0.9, "scorers": 0.1, "trainers": 1.0}
    assert needed_resources(placed(config, shares))["GPU"] == pytest.approx(4.0)


def test_what_the_config_sets_stays_and_the_rest_takes_none() -> None:
    config = load_config("rlsf", ["cluster.generators.gpus=1"])
    assert gpu_shares(config, 8.0) == {"generators": 1.0, "scorers": 0.0, "trainers": 0.0}
    assert gpu_shares(load_config("rlsf", ["cluster.generators.gpus=0"]), 8.0) == NO_GPUS


def test_pools_that_do_not_fit_are_refused_with_the_cure() -> None:
    with pytest.raises(
        InputError, match=r"2 generators, 1 scorers, 1 trainers do not fit 2 GPUs .*cluster.<pool>.gpus"
    ):
        gpu_shares(load_config("rlsf", ["cluster.generators.count=2"]), 2.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["cluster.trainers.gpus=1"], r"got cluster.generators.gpus=0; set it"),
        (["engine_args={tensor_parallel_size: 2}"], r"set cluster.generators.gpus to 2"),
    ],
)
def test_a_vllm_that_would_take_what_ray_counts_free_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        gpu_shares(load_config("rlsf", ["engine=vllm", *settings]), 4.0)
    assert gpu_shares(load_config("rlsf", ["engine=vllm", "cluster.generators.gpus=0"]), 0.0) == NO_GPUS


def test_one_trainer_may_take_a_part_of_a_gpu() -> None:
    assert load_config("rlsf", ["cluster.trainers.gpus=0.4"]).cluster.trainers.gpus == 0.4


def test_nodes_that_have_yet_to_come_count_where_the_head_says_so() -> None:
    assert grown({"CPU": 4.0}) == {"CPU": 4.0}
    head = {"CPU": 0.0, "rlsf_marked": 1.0, "rlsf_gpus": 9.0}
    coming = {"rlsf_generator": 1.0, "rlsf_trainer": 1.0, "GPU": 9.0}
    assert grown(head) == head | coming
    assert grown(head | {"GPU": 12.0, "rlsf_trainer": 2.0}) == head | coming | {"GPU": 12.0, "rlsf_trainer": 2.0}
    assert marks(grown({"rlsf_marked": 1.0}))["trainers"] == {"rlsf_trainer": 0.001}


GENERATOR, TRAINER, PLAIN = {"CPU": 4.0, "rlsf_generator": 1.0}, {"CPU": 4.0, "rlsf_trainer": 1.0}, {"CPU": 4.0}


@pytest.mark.parametrize(
    ("nodes", "fine"),
    [
        ([GENERATOR, TRAINER, PLAIN], True),
        ([PLAIN], False),
        ([TRAINER, PLAIN], False),  # generators go to any node, that of the trainers too
        ([GENERATOR, PLAIN], False),
        ([GENERATOR, TRAINER, GENERATOR | TRAINER], False),
        ([{"CPU": 0.0, "rlsf_marked": 1.0}], True),  # the nodes that will come are marked
    ],
)
def test_trainers_grow_only_on_nodes_of_their_own(nodes: list[dict[str, float]], fine: bool) -> None:
    by = marks(grown({name: 1.0 for node in nodes for name in node}))
    check_growing_trainers(load_config("rlsf"), nodes, by)  # a fixed number stands anywhere
    growing = load_config("rlsf", ["cluster.trainers.most=2"])
    if fine:
        check_growing_trainers(growing, nodes, by)
    else:
        with pytest.raises(InputError, match=r"cluster.trainers.most=2 .* share nodes .* rlsf_trainer .*leave"):
            check_growing_trainers(growing, nodes, by)
