"""Every prompt ends once, and the sums close."""

import json

import pytest

from rlsf_ray.records import Outcome
from rlsf_ray.stream.ledger import IN_FLIGHT, PAIRS, Ledger


def outcome(sequence: int, reason: str | None) -> Outcome:
    return Outcome(
        group_id=f"g{sequence}",
        sequence=sequence,
        num_traces=2,
        num_tokens=10,
        num_cut_off=0,
        num_parsed=2,
        num_examples=0 if reason else 1,
        reason=reason,
    )


def four_ended() -> Ledger:
    ledger = Ledger()
    ledger.admit(0, 5)
    ledger.scored(0, [outcome(0, None), outcome(1, "tie"), outcome(2, None)])
    ledger.failed(0, [3], "EngineError")
    ledger.trained(0, [0])
    return ledger


def test_the_sums_close() -> None:
    assert four_ended().totals() == {
        "admitted": 5,
        "trained": 1,
        "filtered": 1,
        "failed": 1,
        "rolled_back": 0,
        "in_flight": 2,  # prompt 2 has pairs nobody has trained, prompt 4 is still being written
        "reasons": {"tie": 1, "EngineError": 1},
    }


def test_a_roll_back_abandons_what_is_trained_or_open_from_its_round_on() -> None:
    ledger = four_ended()
    ledger.admit(1, 2)
    ledger.scored(1, [outcome(0, "tie")])
    ledger.rolled_back(1)
    assert ledger.totals()["rolled_back"] == 1  # prompt 1 of round 1; prompt 0 was filtered before
    ledger.rolled_back(0)
    totals = ledger.totals()
    assert (totals["trained"], totals["filtered"], totals["failed"], totals["rolled_back"]) == (0, 2, 1, 4)
    assert totals["in_flight"] == 0


def test_telling_it_twice_changes_nothing() -> None:
    ledger = four_ended()
    before = ledger.totals()
    ledger.trained(0, [0])
    ledger.scored(0, [outcome(1, "tie")])
    ledger.admit(0, 5)
    assert ledger.totals() == before


def test_a_prompt_ends_once() -> None:
    ledger = four_ended()
    with pytest.raises(ValueError, match="prompt 1 ended as"):
        ledger.trained(0, [1])
    with pytest.raises(ValueError, match="prompt 0 ended as"):
        ledger.failed(0, [0], "EngineError")


def test_it_survives_a_file() -> None:
    ledger = Ledger.from_json(json.loads(json.dumps(four_ended().to_json())))
    assert ledger.totals() == four_ended().totals()
    assert ledger.sequences(0, IN_FLIGHT) == [4]
    assert ledger.sequences(0, PAIRS) == [2]
    assert (ledger.size(0), ledger.size(1)) == (5, 0)
