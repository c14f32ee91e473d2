"""Rounds wait for versions; age is counted in published versions."""

import pytest

from rlsf_ray.stream.admission import Admission


def test_strict_rounds_wait_for_every_round_before() -> None:
    admission = Admission(max_staleness=0)
    assert admission.may_admit(0)
    assert not admission.may_admit(1)
    admission.end_round(0, 1)
    assert admission.may_admit(1)
    assert admission.least_version(1) == 1


def test_staleness_one_lets_one_round_run_ahead() -> None:
    admission = Admission(max_staleness=1)
    assert admission.may_admit(1)
    assert not admission.may_admit(2)
    assert admission.least_version(1) == 0
    admission.end_round(0, 1)
    assert admission.may_admit(2)
    assert admission.least_version(2) == 1


def test_a_round_without_pairs_publishes_nothing_and_does_not_age_anything() -> None:
    admission = Admission(max_staleness=0)
    admission.end_round(0, 1)
    admission.end_round(1, None)
    assert admission.may_admit(2)
    assert admission.newest == 1
    assert admission.least_version(2) == 1
    admission.end_round(2, 3)
    assert admission.least_version(3) == 3


def test_ending_a_round_twice_changes_nothing_but_a_contradiction_is_refused() -> None:
    admission = Admission(max_staleness=0)
    admission.end_round(0, 1)
    admission.end_round(0, 1)
    assert admission.newest == 1
    with pytest.raises(ValueError, match="round 0 ended with version 1"):
        admission.end_round(0, 2)
    with pytest.raises(ValueError, match="version 1 is published"):
        admission.end_round(1, 1)


def test_rounds_ended_stops_at_the_first_gap() -> None:
    admission = Admission(max_staleness=2)
    admission.end_round(0, 1)
    admission.end_round(2, None)
    assert admission.rounds_ended == 1
