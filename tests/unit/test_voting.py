"""Voting against hand counts, and its symmetries."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsf_ray.algorithms.voting import borda, calibrated, majority, rounds, settled, tally, weighted

Votes = list[tuple[int, int]]
votes_of_a_group = st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 8)), min_size=1, max_size=10)


def test_tally_sums_by_answer_and_counts_absent_weights_zero() -> None:
    assert tally([0, 1, 0, -1, 1], [0.5, 0.25, 0.25, 9.0, np.nan]) == {0: 0.75, 1: 0.25}


def test_tally_refuses_lists_of_different_lengths() -> None:
    with pytest.raises(ValueError, match="got 2 and 1"):
        tally([0, 1], [1.0])


def test_weighted_winner_is_the_heaviest_answer_with_its_share_of_the_whole() -> None:
    # answer 1: 0.9; answer 0: 0.25 + 0.25; unanswered: 0.6; 0.9 / 2.0
    assert weighted([0, 1, 0, -1], [0.25, 0.9, 0.25, 0.6]) == (1, pytest.approx(0.45))


def test_majority_share_is_of_all_traces_and_ties_go_to_the_first_answer() -> None:
    assert majority([1, 0, 0, 1, -1]) == (0, pytest.approx(0.4))


def test_a_vote_without_answers_has_no_winner() -> None:
    assert weighted([-1, -1], [1.0, 1.0]) == (-1, 0.0)
    assert weighted([0], [0.0]) == (0, 0.0)


def test_borda_ranks_cast_votes_by_their_power() -> None:
    labels, scores = [1, 0, 1, 1], [0.2, 0.9, np.nan, 0.1]
    # ranks of 0.9, 0.2, 0.1, absent cast 4, 3, 2, 1 to the power p; p = 1: 4 against 3 + 2 + 1, p = 2: 16 against 14
    assert borda(labels, scores, p=1.0) == (1, pytest.approx(6 / 10))
    assert borda(labels, scores, p=2.0) == (0, pytest.approx(16 / 30))


@given(votes_of_a_group)
def test_borda_with_power_zero_is_the_majority(votes: Votes) -> None:
    labels, scores = zip(*votes, strict=True)
    assert borda(labels, scores, p=0.0) == majority(labels)


@given(votes_of_a_group, st.randoms(use_true_random=False))
def test_the_order_of_the_traces_does_not_change_a_weighted_vote(votes: Votes, random: Random) -> None:
    shuffled = list(votes)
    random.shuffle(shuffled)
    assert weighted(*zip(*shuffled, strict=True)) == weighted(*zip(*votes, strict=True))


def test_a_calibrated_vote_is_as_sure_as_all_traces_together_are_of_the_winner() -> None:
    # answer 1: 0.5 + 0.75; answer 0: 0.25; the last trace has no answer
    assert calibrated([0, 1, 1, -1], [0.25, 0.5, 0.75, 0.0]) == (1, pytest.approx(1.25 / 4), pytest.approx(1.0))
    assert calibrated([2], [0.5]) == (2, 0.5, 0.5)
    assert calibrated([-1, -1], [0.0, 0.0]) == calibrated([], []) == (-1, 0.0, 0.0)


def test_a_question_is_put_to_twice_as_many_traces_each_time() -> None:
    assert rounds(1) == [1]
    assert rounds(2) == [1, 2]
    assert rounds(8) == [1, 2, 4, 8]
    assert rounds(11) == [1, 2, 4, 8, 11]
    assert rounds(100) == [1, 2, 4, 8, 16, 100]


@pytest.mark.parametrize(
    ("vote", "traces", "done"),
    [
        ((0.8, 0.8), 1, True),  # sure enough
        ((0.79, 0.79), 1, False),
        ((0.5, 4.1), 4, True),  # four more of weight 1 cannot catch up
        ((0.5, 4.0), 4, False),
        ((0.1, 0.1), 8, True),  # there are no more
        ((0.0, 0.0), 4, False),  # no answer yet
    ],
)
def test_when_a_vote_is_settled(vote: tuple[float, float], traces: int, done: bool) -> None:
    assert settled(vote, traces, sure=0.8, most=8) is done


def test_without_an_answer_nothing_is_settled_however_little_is_asked_for() -> None:
    assert not settled((0.0, 0.0), 1, sure=0.0, most=8)
