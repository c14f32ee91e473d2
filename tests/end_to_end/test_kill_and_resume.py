"""A run of its own Ray is stopped twice and killed as a whole twice; the same command brings it to the calm end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import private_cluster
import pytest
from chaos_check import lineage
from private_cluster import Sandbox, Shell
from tiny import tiny_config

from rlsf_ray import loop
from rlsf_ray.config import RunConfig
from rlsf_ray.config_loading import dump_config
from rlsf_ray.run_store import RunStore

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

ROUNDS, PROMPTS = 3, 24
SUMS = {"name": "chain_sum", "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}
START_S = 150.0  # a life of the run shows its first effect within so long, on a busy machine


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    if reason := private_cluster.unavailable():
        pytest.skip(reason)
    with Sandbox(tmp_path_factory.mktemp("killed")) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def long_config(tiny: Path) -> RunConfig:
    """Rounds of 24 batches and about 40 optimiser steps: long enough to be hit."""
    return tiny_config(
        tiny,
        rounds=ROUNDS,
        prompts_per_round=PROMPTS,
        data={"train": [SUMS | {"count": 40}], "probe": []},
        learner={"epochs": 4},
        cluster={"prompts_per_call": 1},
    )


@pytest.fixture(scope="module")
def disturbed(sandbox: Sandbox, long_config: RunConfig) -> RunStore:
    """The run after five lives: stopped while starting, killed while generating, killed while training, stopped
    while generating, finished.
    """
    (sandbox.folder / "tiny.yaml").write_text(dump_config(long_config))
    root = sandbox.folder / "runs" / "hit"

    early = begin(sandbox)
    early.until(lambda: any("Coordinator" in line for line in sandbox.processes()), START_S)
    early.terminate()
    assert early.wait(60) == 5, early.output
    leaves_nothing(sandbox)

    first = begin(sandbox)
    first.until(lambda: batches(root, 0) > 0, START_S)
    sandbox.restart()
    assert 0 < batches(root, 0) < PROMPTS, "killed while round 0 was generated"
    assert RunStore.open(str(root)).versions() == []

    second = begin(sandbox)
    second.until(lambda: steps(root, 1) > 2, START_S)
    sandbox.restart()
    state = json.loads((root / "state.json").read_text())
    assert (state["state"], state["ended"]) == ("running", [[0, 1]]), "killed while round 1 was trained"

    third = begin(sandbox)
    third.until(lambda: batches(root, 2) > 0, START_S)
    third.terminate()
    assert third.wait(60) == 5, third.output
    assert "asked to stop; the same command resumes it" in third.output
    leaves_nothing(sandbox)
    state = json.loads((root / "state.json").read_text())
    assert (state["state"], state["ended"]) == ("drained", [[0, 1], [1, 2]])

    fourth = begin(sandbox)
    assert fourth.wait(START_S + 60) == 0, fourth.output
    return RunStore.open(str(root))


def begin(sandbox: Sandbox) -> Shell:
    return sandbox.start("rlsf", "run", "tiny.yaml", "--root", "runs", "--run", "hit")


def leaves_nothing(sandbox: Sandbox) -> None:
    """Ray's own processes end within seconds of the driver."""
    end = time.monotonic() + 10
    while left := sandbox.processes():
        assert time.monotonic() < end, left
        time.sleep(0.1)


def batches(root: Path, round: int) -> int:
    """Batches of a round whose traces are stored."""
    return len(list((root / f"traces/round-{round:04d}").glob("part-*.parquet")))


def steps(root: Path, round: int) -> int:
    """Optimiser steps of a round so far, over all lives."""
    path = root / "metrics/train.jsonl"
    return path.read_text().count(f'"round": {round},') if path.exists() else 0


def test_no_prompt_is_lost_or_trained_twice(disturbed: RunStore) -> None:
    count = disturbed.read_json("summary.json")["accounting"]
    assert count["admitted"] == ROUNDS * PROMPTS == count["trained"] + count["filtered"] + count["failed"]
    assert (count["in_flight"], count["failed"]) == (0, 0)
    groups = disturbed.read_table("groups").to_pylist()
    assert len({group["id"] for group in groups}) == len(groups) == count["trained"]
    traces = disturbed.read_table("traces").to_pylist()
    assert len({row["trace_id"] for row in traces}) == len(traces) == ROUNDS * PROMPTS * 4  # traces a prompt


def test_every_pair_was_trained_four_times_in_the_lineage_of_the_last_adapter(disturbed: RunStore) -> None:
    """Of the rounds one was killed in training, one drained; the epochs are four."""
    times, breaks = lineage(disturbed)
    pairs = disturbed.read_table("pairs").to_pylist()
    assert times == {f"{row['chosen_trace_id']} > {row['rejected_trace_id']}": 4 for row in pairs}
    assert breaks == []


def test_the_chain_of_versions_is_whole_and_each_trace_names_its_writer(disturbed: RunStore) -> None:
    assert disturbed.versions() == [1, 2, 3]
    traces = disturbed.read_table("traces").to_pylist()
    assert {(row["round"], row["version"]) for row in traces} == {(0, 0), (1, 1), (2, 2)}


def test_pairs_and_adapters_are_those_of_an_undisturbed_run(
    disturbed: RunStore, long_config: RunConfig, tmp_path: Path
) -> None:
    summary = loop.run(long_config, str(tmp_path / "loop"))
    calm = RunStore.open(str(tmp_path / "loop"))
    assert disturbed.read_table("pairs").to_pylist() == calm.read_table("pairs").to_pylist()
    assert disturbed.read_json("summary.json")["accounting"] == summary["accounting"]
    for version in (1, 2, 3):
        ours, expected = disturbed.read_adapter(version)[0], calm.read_adapter(version)[0]
        assert max(np.abs(ours[name] - expected[name]).max() for name in expected) <= 1e-6
