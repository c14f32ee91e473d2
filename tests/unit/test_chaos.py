"""What chaos.py decides by: run directories made by hand, sound and with a fault planted."""

from __future__ import annotations

import math
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import chaos_kills
import numpy as np
import pytest
from chaos_check import Accounts, check, faults, lineage, table, unequal
from chaos_kills import Hang, Killer, watch
from running import wait_for
from tiny import tiny_config

from rlsf_ray.config import RunConfig
from rlsf_ray.records import Json
from rlsf_ray.run_store import TRAINED_FILE, RunStore

ROUNDS, PROMPTS, EPOCHS = 2, 3, 2
NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def adapter(value: float) -> dict[str, np.ndarray]:
    return {NAME.format(side): np.full((2, 2), value, np.float32) for side in "AB"}


def adapter_json(store: RunStore, version: int, made: Json) -> None:
    store.write_json(f"versions/{version:04d}/{TRAINED_FILE}", made)


def pair(round: int, prompt: int) -> str:
    return f"r{round}/{prompt}/0 > r{round}/{prompt}/1"


def finished(root: Path, config: RunConfig) -> RunStore:
    """Two rounds: in each the prompts 0 and 1 gave a pair that was trained twice, prompt 2 was filtered."""
    store, before = RunStore.create_or_resume(str(root), config), "of the drawn adapter"
    for round in range(ROUNDS):
        traces = [trace(round, prompt, index) for prompt in range(PROMPTS) for index in range(2)]
        store.write_table("traces", round, 0, traces)
        store.write_table("pairs", round, 0, [pair_row(round, prompt) for prompt in (0, 1)])
        made = store.write_adapter(round + 1, adapter(round + 1.0), "tiny", config)
        adapter_json(store, round + 1, {"from": before, "times": {pair(round, prompt): EPOCHS for prompt in (0, 1)}})
        before = made.checksum
    ledger = {str(round): [["trained", ""], ["trained", ""], ["filtered", "all_equal"]] for round in range(ROUNDS)}
    store.write_json("state.json", {"ledger": ledger})
    counts = {"admitted": 6, "trained": 4, "filtered": 2, "failed": 0, "rolled_back": 0, "in_flight": 0}
    store.write_json("summary.json", {"accounting": counts})
    return store


def trace(round: int, prompt: int, index: int) -> Json:
    group = f"r{round}/{prompt}"
    shared = {"round": round, "sequence": prompt, "group_id": group, "version": round, "text": f"{index}"}
    return shared | {"trace_id": f"{group}/{index}", "reason": "all_equal" if prompt == 2 else None}


def pair_row(round: int, prompt: int) -> Json:
    group = f"r{round}/{prompt}"
    return {
        "group_id": group,
        "round": round,
        "chosen_trace_id": f"{group}/0",
        "rejected_trace_id": f"{group}/1",
        "weight": 1.0,
    }


@pytest.fixture
def of_three(tmp_path: Path) -> RunConfig:
    return tiny_config(tmp_path, rounds=ROUNDS, prompts_per_round=PROMPTS, learner={"epochs": EPOCHS})


def result_of(store: RunStore, calm: RunStore, **changes: Any) -> Json:
    kill = {"role": "scorer", "round": 1, "step": 3, "stage": "training", "back_s": 2.0, "new_life": False}
    accounts = {"samples": {"status": 5, "disk": 5}, "violations": []}
    return {"wanted": 1, "kills": [kill], "errors": [], "accounts": accounts, "check": check(store, calm)} | changes


def times(store: RunStore, version: int, **changes: Any) -> None:
    """Change what is kept of a version's training."""
    made = store.read_json(f"versions/{version:04d}/{TRAINED_FILE}")
    adapter_json(store, version, made | changes)


def ledger(store: RunStore, round: int, prompt: int, entry: list[str] | None) -> None:
    """Change the end of a prompt; None: it is not there."""
    books = store.read_json("state.json")["ledger"]
    books[str(round)][prompt : prompt + 1] = [] if entry is None else [entry]
    store.write_json("state.json", {"ledger": books})


def test_a_sound_run_has_no_faults(of_three: RunConfig, tmp_path: Path) -> None:
    store, calm = finished(tmp_path / "hit", of_three), finished(tmp_path / "calm", of_three)
    result = result_of(store, calm)
    assert faults(result, of_three) == []
    assert (result["check"]["pairs"], result["check"]["times"]) == (4, 8)
    text = table(result)
    assert "| scorer | 1 | 1 | 0 | 2.0 | 2.0 |" in text
    assert "6 prompts: lost 0, doubled 0. 4 pairs, trained 8 times: lost 0, doubled 0." in text
    assert "into 1 rounds from 2 to 2, after step 3 to 3: 1 while training" in text


FAULTS: dict[str, tuple[Callable[[RunStore], Any], str]] = {
    "a pair trained once more": (
        lambda store: times(store, 2, times={pair(1, 0): 3, pair(1, 1): 2}),
        "1 doubled_pairs",
    ),
    "a pair trained once too little": (
        lambda store: times(store, 2, times={pair(1, 0): 1, pair(1, 1): 2}),
        "1 lost_pairs",
    ),
    "a pair of an earlier round trained again": (
        lambda store: times(store, 2, times={pair(1, 0): 2, pair(1, 1): 2, pair(0, 0): 2}),
        "2 doubled_pairs",
    ),
    "a prompt's pairs not in the adapter though the ledger says so": (
        lambda store: times(store, 1, times={pair(0, 0): 2}),
        "1 lost_prompts: .(0, 1)",
    ),
    "a prompt filtered and trained": (
        lambda store: ledger(store, 1, 0, ["filtered", "all_equal"]),
        "1 doubled_prompts: .(1, 0)",
    ),
    "a prompt in flight at the end": (
        lambda store: ledger(store, 0, 2, ["in_flight", ""]),
        "1 lost_prompts: .(0, 2)",
    ),
    "a prompt that was never admitted": (lambda store: ledger(store, 0, 2, None), "1 lost_prompts: .(0, 2)"),
    "a prompt given up, which the undisturbed run has filtered": (
        lambda store: ledger(store, 0, 2, ["failed", "TracesLost"]),
        "ends_equal not",
    ),
    "a version trained from other weights than those before it": (
        lambda store: times(store, 2, **{"from": "others"}),
        "1 breaks: .'version 2 was not trained from version 1'",
    ),
    "a version of which nobody knows the training": (
        lambda store: store.storage.remove(f"versions/0001/{TRAINED_FILE}"),
        "1 breaks",
    ),
    "a pair stored twice": (
        lambda store: store.write_table("pairs", 1, 1, [pair_row(1, 0)]),
        "pairs_equal not",
    ),
    "a trace stored twice": (
        lambda store: store.write_table("traces", 1, 1, [trace(1, 2, 0)]),
        "traces_equal not",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(of_three: RunConfig, tmp_path: Path, name: str) -> None:
    store, calm = finished(tmp_path / "hit", of_three), finished(tmp_path / "calm", of_three)
    plant, expected = FAULTS[name]
    plant(store)
    found = faults(result_of(store, calm), of_three)
    assert any(line.startswith(expected.replace(".", "[", 1)) for line in found), found


@pytest.mark.parametrize(("off", "counts"), [(1e-7, False), (1e-3, True), (math.nan, True)])
def test_another_last_adapter_is_a_fault(of_three: RunConfig, tmp_path: Path, off: float, counts: bool) -> None:
    store, calm = finished(tmp_path / "hit", of_three), finished(tmp_path / "calm", of_three)
    store.storage.remove("versions/0002/version.json")
    changed = adapter(2.0)
    changed[NAME.format("B")][1, 1] += np.float32(off)
    store.write_adapter(2, changed, "tiny", of_three)
    found = faults(result_of(store, calm), of_three)
    assert any("adapter differs" in line for line in found) == counts
    assert bool(found) == counts


COUNTS = {"admitted": 6, "trained": 2, "filtered": 1, "failed": 1, "in_flight": 2}


def test_an_unequal_sample_of_the_accounting_is_a_fault(of_three: RunConfig, tmp_path: Path) -> None:
    assert unequal(COUNTS, of_three) == []
    for changes in ({"in_flight": 1}, {"trained": 3}, {"admitted": 5, "in_flight": 1}, {"admitted": 9, "in_flight": 5}):
        assert unequal(COUNTS | changes, of_three), changes
    accounts = Accounts(tmp_path, of_three)
    accounts.status({"state": "starting"})  # has none yet
    accounts.status({"accounting": COUNTS})
    accounts.status({"accounting": COUNTS | {"trained": 1}})
    assert (accounts.samples["status"], len(accounts.violations)) == (2, 1)
    store, calm = finished(tmp_path / "hit", of_three), finished(tmp_path / "calm", of_three)
    sampled = {"samples": {"status": 2, "disk": 1}, "violations": accounts.violations}
    assert "1 samples of the accounting" in faults(result_of(store, calm, accounts=sampled), of_three)[0]
    nothing = {"samples": {"status": 0, "disk": 1}, "violations": []}
    assert "was not sampled" in faults(result_of(store, calm, accounts=nothing), of_three)[0]


@pytest.mark.parametrize(
    ("later", "violations"),
    [
        ([["trained", ""], ["filtered", "all_equal"], ["pairs", ""]], 0),  # what was open may end
        ([["filtered", "all_equal"], ["in_flight", ""], ["in_flight", ""]], 1),  # what had ended ends otherwise
        ([["in_flight", ""]] * 3, 1),  # it is forgotten
        ([["trained", ""]] * 2, 1),  # a prompt of the round is gone
    ],
)
def test_what_has_ended_on_disk_has_ended_for_good(
    of_three: RunConfig, tmp_path: Path, later: list[list[str]], violations: int
) -> None:
    accounts = Accounts(tmp_path, of_three)
    accounts.books({"0": [["trained", ""], ["in_flight", ""], ["pairs", ""]]})
    accounts.books({"0": later})
    assert (accounts.samples["disk"], len(accounts.violations)) == (2, violations)


def test_what_is_trained_on_disk_lies_in_a_version(of_three: RunConfig, tmp_path: Path) -> None:
    store = finished(tmp_path, of_three)
    state = store.read_json("state.json")
    for ended, violations in (([[0, 1], [1, 2]], 0), ([[0, 1], [1, None]], 0), ([[0, 1], [1, 3]], 1)):
        store.write_json("state.json", state | {"ended": ended})
        accounts = Accounts(tmp_path, of_three)
        accounts.disk()
        accounts.disk()  # too soon
        assert (accounts.samples["disk"], len(accounts.violations)) == (1, violations)


@pytest.mark.parametrize("trained", [[pair(1, 0)], [pair(1, 0), pair(1, 1), pair(1, 2)]])
def test_a_version_trained_on_other_prompts_than_are_booked_is_a_fault(
    of_three: RunConfig, tmp_path: Path, trained: list[str]
) -> None:
    store = finished(tmp_path, of_three)
    times(store, 2, times=dict.fromkeys(trained, EPOCHS))
    store.write_json("state.json", store.read_json("state.json") | {"ended": [[0, 1], [1, 2]]})
    accounts = Accounts(tmp_path, of_three)
    accounts.disk()
    assert accounts.violations == [f"2 prompts booked as trained, version 2 has {len(trained)}"]


def test_kills_that_the_end_of_the_run_has_overtaken_do_not_count(of_three: RunConfig, tmp_path: Path) -> None:
    store, calm = finished(tmp_path / "hit", of_three), finished(tmp_path / "calm", of_three)
    kill = {"role": "scorer", "round": 1, "step": 3, "stage": "training", "new_life": True}
    result = result_of(store, calm, kills=[kill | {"back_s": 2.0}, kill | {"back_s": None}], wanted=2)
    assert "only 1 of 2 kills count" in faults(result, of_three)[0]
    assert "1 kills (1 more left out" in table(result)
    assert faults(result | {"wanted": 1}, of_three) == []


def test_the_lineage_counts_what_every_version_of_the_chain_was_trained_on(of_three: RunConfig, tmp_path: Path) -> None:
    times, breaks = lineage(finished(tmp_path / "hit", of_three))
    assert times == {pair(round, prompt): EPOCHS for round in range(ROUNDS) for prompt in (0, 1)}
    assert breaks == []


def test_a_wait_tells_ready_over_and_hung_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos_kills, "MOVE_S", 0.5)
    assert watch(tmp_path, lambda: True, lambda: True, "nothing")
    assert not watch(tmp_path, lambda: False, lambda: True, "nothing")
    began = time.monotonic()
    with pytest.raises(Hang, match=r"not moved for 0.5 s; waited for the scorer"):
        watch(tmp_path, lambda: False, lambda: False, "the scorer")
    assert time.monotonic() - began < 5


def test_a_run_that_moves_has_not_hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos_kills, "MOVE_S", 0.5)
    store, parts = RunStore.create_or_resume(str(tmp_path), tiny_config(tmp_path)), list[int]()

    def ready() -> bool:  # longer than the deadline, with a batch at each look
        parts.append(len(parts))
        store.write_table("traces", 0, parts[-1], [])
        return len(parts) > 5

    assert watch(tmp_path, ready, lambda: False, "the end")


def scorer() -> subprocess.Popen[bytes]:
    """A process that Ray's title makes a scorer."""
    return subprocess.Popen(["ray::ScorerWorker.score", "300"], executable=shutil.which("sleep"))


@pytest.mark.parametrize("over", [False, True])
def test_a_kill_counts_once_the_process_is_back_and_the_run_has_moved_on(
    of_three: RunConfig, tmp_path: Path, over: bool
) -> None:
    store = RunStore.create_or_resume(str(tmp_path), of_three)
    killer, first = Killer(tmp_path, Accounts(tmp_path, of_three), 1, 0), scorer()
    with ThreadPoolExecutor(1) as thread:
        killing = thread.submit(killer._kill, "scorer")
        assert first.wait(10) == -9
        second = scorer()
        try:
            with pytest.raises(AssertionError, match="nothing within"):  # it is back, but the run stands still
                wait_for(killing.done, 1.0)
            if over:
                killer.over.set()
            else:
                store.write_table("traces", 0, 0, [])
            killing.result(10)
        finally:
            killer.over.set()
            second.kill()
            second.wait(10)
    (kill,) = killer.kills
    assert (kill.back_s is None) == over


def test_a_run_that_hangs_after_a_kill_is_said_to_hang(
    of_three: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chaos_kills, "MOVE_S", 0.5)
    killer, signals = Killer(tmp_path, Accounts(tmp_path, of_three), 1, 0), list[int]()
    monkeypatch.setattr(chaos_kills.os, "kill", lambda process, number: (signals.append(number), killer.over.set()))
    killer.look({"message": "waiting for the trainer"})
    killer.run()
    assert "HANG in life 0: the run has not moved for 0.5 s; waited for work after the start" in killer.hung
    assert "'message': 'waiting for the trainer'" in killer.hung
    assert killer.hung in capsys.readouterr().out
    assert signals == [15]
