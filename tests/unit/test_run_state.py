"""A run's bookkeeping: commits must match the scorers' word, and state.json brings it all back."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_config
from vitals_data import HEALTHY

from rlsf_ray.config import RunConfig
from rlsf_ray.errors import EngineError, GuardError, InputError, NoPairsError, ServiceError
from rlsf_ray.records import Json, Outcome
from rlsf_ray.stream.run_state import RunState


def outcome(sequence: int, reason: str | None) -> Outcome:
    return Outcome(
        group_id=f"g{sequence}",
        sequence=sequence,
        num_traces=4,
        num_tokens=40,
        num_cut_off=1,
        num_parsed=3,
        num_examples=0 if reason else 2,
        reason=reason,
    )


@pytest.fixture
def small() -> RunConfig:
    return tiny_config(Path("model"))  # two rounds of eight prompts


@pytest.fixture
def state(small: RunConfig) -> RunState:
    """Round 0 has four prompts: 0 and 2 have pairs, 1 is filtered, 3 is still being written."""
    state = RunState("run", small, clock=lambda: 100.0)
    state.ledger.admit(0, 4)
    state.scored(0, [outcome(0, None), outcome(1, "tie"), outcome(2, None)])
    return state


def test_a_commit_that_left_out_a_group_is_refused(state: RunState) -> None:
    with pytest.raises(ValueError, match=r"groups \[2\] have pairs but were not trained"):
        state.committed(0, 1, [0], {}, {})


def test_a_commit_ends_the_round_and_makes_its_version_the_newest(state: RunState) -> None:
    state.committed(0, 1, [0, 2], {}, {})
    assert state.admission.newest == 1
    assert state.ledger.totals()["trained"] == 2


def test_the_status_counts_scored_prompts_as_done(state: RunState) -> None:
    status = state.status()
    assert (status["prompts_done"], status["prompts_total"]) == (3, 16)
    assert (status["traces"], status["pairs"], status["version"]) == (12, 4, 0)
    assert status["accounting"]["in_flight"] == 3  # two with pairs that nobody has trained, one being written


def test_the_time_left_follows_from_prompts_and_steps(small: RunConfig) -> None:
    """After 10 s: 2 of 16 prompts, with 4 pairs. So 32 pairs in all, 2 passes of 4 a step: 16 steps, 4 done.

    (2/16 + 4/16) / 2 = 3/16 took 10 s, so 13/16 more take 130/3 s.
    """
    now = [0.0]
    state = RunState("run", small, clock=lambda: now[0])
    assert state.status()["eta_s"] is None
    state.ledger.admit(0, 4)
    state.scored(0, [outcome(0, None), outcome(1, None)])
    state.counts["steps"] = 4
    now[0] = 10.0
    assert state.status()["eta_s"] == pytest.approx(130 / 3)
    state.state = "done"
    assert state.status()["eta_s"] is None


def test_what_a_crash_left_uncounted_is_counted_once(state: RunState) -> None:
    """Sequences 0, 1, 2 are known (12 traces, 4 pairs); 3 is news (4 traces, 2 pairs)."""
    state.recovered(0, [outcome(0, None), outcome(1, "tie"), outcome(2, None), outcome(3, None)])
    assert (state.counts["traces"], state.counts["pairs"]) == (16, 6)
    state.recovered(0, [outcome(3, None)])
    assert (state.counts["traces"], state.counts["pairs"]) == (16, 6)
    assert state.ledger.totals()["filtered"] == 1


def test_traces_per_second_leave_out_what_was_recovered(small: RunConfig) -> None:
    """Of 8 traces, 4 came in the 2 s of this life."""
    now = [0.0]
    state = RunState("run", small, clock=lambda: now[0])
    state.ledger.admit(0, 4)
    state.recovered(0, [outcome(0, None)])
    state.work_begins()
    state.scored(0, [outcome(1, None)])
    now[0] = 2.0
    assert (state.counts["traces"], state.status()["traces_per_s"]) == (8, 2.0)


def test_the_shares_are_of_all_traces_so_far(state: RunState, small: RunConfig) -> None:
    """Of 4 traces each, 3 are parsed and 1 is cut off."""
    assert state.status()["share_parsed"] == pytest.approx(0.75)
    assert state.measured()["training"]["share_cut_off"] == pytest.approx(0.25)
    assert RunState("run", small).status()["share_parsed"] is None


def test_a_run_of_which_every_batch_failed_says_so(small: RunConfig) -> None:
    state = RunState("run", small)
    state.ledger.admit(0, 4)
    state.ledger.failed(0, [0, 1, 2, 3], "EngineError")
    error = state.nothing_trained()
    assert isinstance(error, ServiceError)
    assert "4 of 4 prompts (EngineError: 4)" in str(error)


def test_a_run_with_a_filtered_prompt_has_no_pairs(small: RunConfig) -> None:
    state = RunState("run", small)
    state.ledger.admit(0, 2)
    state.ledger.failed(0, [0], "EngineError")
    state.ledger.recovered(0, {1: "tie"})
    error = state.nothing_trained()
    assert isinstance(error, NoPairsError)
    assert "EngineError: 1, tie: 1" in str(error)


def test_state_json_brings_everything_back(state: RunState, small: RunConfig) -> None:
    state.committed(0, 1, [0, 2], {}, {})
    state.had_no_pairs(1)
    again = RunState("run", small, json.loads(json.dumps(state.to_json())), clock=lambda: 500.0)
    assert (again.admission.newest, again.admission.rounds_ended) == (1, 2)
    assert again.ledger.totals() == state.ledger.totals()
    assert again.counts == state.counts
    assert again.to_json()["ended"] == [[0, 1], [1, None]]


def test_the_error_that_ended_a_run_is_kept_until_its_next_life(state: RunState, small: RunConfig) -> None:
    assert state.to_json()["error"] is None
    state.stopped(EngineError("no memory"))
    saved = state.to_json()
    assert saved["error"] == {"type": "EngineError", "text": "no memory"}
    assert RunState("run", small, saved).to_json()["error"] is None


GOOD: Json = asdict(HEALTHY)
BAD = GOOD | {"length": 5.0}


def three_rounds(**changes: Any) -> RunState:
    """Versions 1 and 2 are trained, version 2 writes far too short; round 2 is being written."""
    state = RunState("run", tiny_config(Path("model"), rounds=4, **changes))
    for round in (0, 1, 2):
        state.ledger.admit(round, 2)
        state.scored(round, [outcome(0, None), outcome(1, "tie")])
        if round < 2:
            state.committed(round, round + 1, [0], {}, {})
    for version, vitals in enumerate((GOOD, GOOD)):
        assert state.judged(version, vitals) == "go_on"
    return state


def test_the_guard_sees_how_far_a_round_was_from_the_base_model(small: RunConfig, caplog: Any) -> None:
    state = RunState("run", small)
    state.ledger.admit(0, 1)
    state.scored(0, [outcome(0, None)])
    state.committed(0, 1, [0], {"kl": 0.7, "logprob_gap": 0.05}, {})
    again = RunState("run", small, json.loads(json.dumps(state.to_json())))  # a resume
    for watching in (state, again):
        assert watching.judged(0, GOOD) == "go_on"
        assert watching.judged(1, GOOD) == "warn"
        assert "kl is 0.7" in watching.verdicts[0]["reasons"][0]


def test_a_roll_back_ends_every_round_and_gives_every_prompt_an_end() -> None:
    state = three_rounds()
    assert state.judged(2, BAD) == "stop"
    assert state.ends_early
    state = _resumed(state)
    for version, share, trained in ((7, 0.125, 2), (8, 0.0, 1)):  # 7: a gap is no matter
        state.roll_back(version)
        state = _resumed(state)
        assert state.rolled_back == {"from": 2, "to": 1, "past": 2, "share": share, "version": version}
        assert state.admission.newest == version
        assert state.admission.rounds_ended >= 4
        totals = state.ledger.totals()
        assert (totals["trained"], totals["rolled_back"]) == (trained, 3 - trained), (
            "a round with a part in it is trained"
        )
        assert (totals["filtered"], totals["in_flight"]) == (3, 0)
        assert state.judged(version, BAD) == ("stop" if share else "go_on"), "a good version is not judged again"


def test_a_version_part_of_the_way_is_compared_with_the_good_one() -> None:
    """Half of its votes are others than those of the version that was stopped, all are those of the good one."""
    state = three_rounds()
    votes = {str(i): "1" for i in range(20)}
    for version in (0, 1):
        state.guard._seen[version] = replace(HEALTHY, votes=votes)
    assert state.judged(2, asdict(HEALTHY) | {"votes": votes | {str(i): "2" for i in range(10)}}) == "stop"
    state.roll_back(3)
    assert state.judged(3, asdict(HEALTHY) | {"votes": votes}) == "go_on"
    assert [one["since"] for one in _resumed(state).guard.to_json()] == [None, 0, 1, 1]


def _resumed(state: RunState) -> RunState:
    return RunState("run", tiny_config(Path("model"), rounds=4), json.loads(json.dumps(state.to_json())))


def test_a_resumed_run_knows_what_the_guard_has_said() -> None:
    state = three_rounds()
    state.judged(2, BAD)
    again = RunState("run", tiny_config(Path("model"), rounds=4), json.loads(json.dumps(state.to_json())))
    assert again.ends_early
    assert again.guard.last_good == 1
    assert again.verdicts == state.verdicts
    again.roll_back(3)
    third = RunState("run", tiny_config(Path("model"), rounds=4), json.loads(json.dumps(again.to_json())))
    assert third.rolled_back == again.rolled_back


def test_a_guard_that_stops_does_not_roll_back_in_a_second_life() -> None:
    state = three_rounds(guard="stop")
    with pytest.raises(GuardError, match="the last good one is version 1: export it"):
        state.judged(2, BAD)
    again = RunState("run", tiny_config(Path("model"), rounds=4, guard="stop"), json.loads(json.dumps(state.to_json())))
    assert not again.ends_early
    with pytest.raises(GuardError):
        again.judged(2, BAD)


def test_a_guard_that_warns_keeps_what_it_found() -> None:
    state = three_rounds(guard="warn")
    assert state.judged(2, BAD) == "warn"
    (verdict,) = state.verdicts
    assert (verdict["action"], verdict["found"]) == ("warn", "stop")
    assert not state.ends_early


def test_low_entropy_before_training_on_rewards_is_warned_of_once() -> None:
    sure = asdict(HEALTHY) | {"surprisal": 0.3}
    settings: Json = {"advantages": {}, "signal": "self_certainty"}
    checked: Json = {"advantages": {}, "signal": "passed", "rollout": {"name": "reflect_retry"}}
    for changes, expected in ((settings, [0]), (checked, []), ({}, [])):
        config = tiny_config(Path("model"), **changes)
        state = RunState("run", config, clock=lambda: 100.0)
        for _ in range(2):  # a resumed run asks again
            assert state.judged(0, sure) == "go_on"
        assert [one["version"] for one in state.verdicts] == expected
    calm = RunState("run", tiny_config(Path("model"), **settings), clock=lambda: 100.0)
    calm.judged(0, sure | {"surprisal": 0.8})
    assert calm.verdicts == []


def test_a_round_of_the_reward_model_ends_without_a_version() -> None:
    settings: Json = {"advantages": {}, "reward_model": {}, "pairs": {"rule": "random"}}
    state = RunState("run", tiny_config(Path("model"), **settings), clock=lambda: 100.0)
    state.ledger.admit(0, 1)
    state.scored(0, [outcome(0, None)])
    state.committed(0, None, [0], {}, {})
    assert (state.admission.newest, state.admission.rounds_ended) == (0, 1)
    assert state.ledger.totals()["trained"] == 1
    assert RunState("run", tiny_config(Path("model"), **settings), state.to_json()).admission.rounds_ended == 1


def test_groups_that_were_not_sure_enough_end_as_filtered_and_their_pairs_do_not_count(state: RunState) -> None:
    state.committed(0, 1, [0], {}, {2: 2})
    totals = state.ledger.totals()
    assert (totals["trained"], totals["reasons"]) == (1, {"tie": 1, "less_sure": 1})
    assert state.counts["pairs"] == 2  # of the four


def test_a_run_can_be_asked_to_go_back_once_and_to_an_older_version_only(small: RunConfig) -> None:
    state = RunState("run", tiny_config(Path("model"), rounds=4))
    with pytest.raises(InputError, match=r"its newest is 0; expected one of \[0\]"):
        state.ask_back(0)
    for round in range(3):
        state.admission.end_round(round, round + 1)
    for wrong in (3, 4, -1):
        with pytest.raises(InputError, match=rf"cannot go back to version {wrong}: .*expected one of \[0, 1, 2\]"):
            state.ask_back(wrong)
    state.ask_back(1)
    with pytest.raises(InputError, match="is going back already"):
        state.ask_back(0)
    again = RunState("run", tiny_config(Path("model"), rounds=4), json.loads(json.dumps(state.to_json())))
    assert again.ends_early, "a run that dies meanwhile goes back in its next life"
    assert asdict(again.way_back()) == {"to": 1, "past": None, "share": 0.0}


def test_what_an_operator_should_hear_is_kept_until_told(small: RunConfig) -> None:
    state = RunState("run", small)
    swap = {"actor": "generator-0", "version": 1, "verdict": "proved", "share": 1.0, "expected_move": 1.0, "gap": 0.0}
    state.swapped(swap | {"loads": 1})
    assert state.news == []
    state.swapped(swap | {"loads": 2})
    assert state.judged(0, GOOD) == "go_on"
    state.judged(1, BAD)
    assert [one["event"] for one in state.news] == ["quarantine", "guard"]
    assert state.news[0]["text"] == "generator-0 had to load version 1 2 times: proved"
    assert state.news[1]["text"].startswith("guard: stop at version 1: ")


def test_a_disk_that_gets_full_is_news_once(small: RunConfig) -> None:
    state = RunState("run", small)
    for used in (None, 0.5, 0.91, 0.95, 0.4, 0.9):
        state.on_disk(used)
    assert [one["text"] for one in state.news] == [f"the disk of the run directory is {n}% full" for n in (91, 90)]
    assert state.status()["disk_used"] == 0.9
