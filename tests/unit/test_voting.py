"""Voting against hand counts, and its symmetries."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsf_ray.algorithms.voting import borda, majority, tally, weighted

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
