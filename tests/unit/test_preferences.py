"""Pair rules against pairs chosen by hand, and each named reason."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsf_ray.algorithms.preferences import RULES, Candidates, Decision, Limits

NAN = math.nan


def candidates(
    scores: Sequence[float],
    labels: Sequence[int],
    lengths: Sequence[int] | None = None,
    cut_off: Sequence[int] = (),
) -> Candidates:
    size = len(scores)
    return Candidates(
        scores=np.array(scores, dtype=np.float64),
        labels=np.array(labels, dtype=np.int64),
        lengths=np.array(lengths or [10] * size, dtype=np.int64),
        finished=np.array([i not in cut_off for i in range(size)], dtype=np.bool_),
    )


def decide(rule: str, group: Candidates, limits: Limits | None = None, seed: int = 0) -> Decision:
    return RULES[rule](group, limits or Limits(), np.random.default_rng(seed))


def ends(decision: Decision) -> list[tuple[int, int]]:
    return [(chosen, rejected) for chosen, rejected, _, _ in decision.pairs]


# Answer 0 weighs 0.5 + 0.25 = 0.75, answer 1 weighs 0.625; trace 3 has no answer, trace 4 was cut off.
SCORES, LABELS = (0.25, 0.625, 0.5, NAN, NAN), (0, 1, 0, -1, 0)


def test_voted_pairs_the_surest_of_the_winning_answer_with_the_least_sure_of_the_rest() -> None:
    decision = decide("voted", candidates(SCORES, LABELS, cut_off=[4]))
    # winners by falling score: 2, 0; the rest by rising score, absent lowest: 3, 4, 1
    assert decision.pairs == ((2, 3, 1.0, 0.5), (0, 4, 1.0, 0.25))


def test_voted_caps_the_pairs_before_the_limits_on_each_pair() -> None:
    group = candidates(SCORES, LABELS, lengths=[10, 10, 10, 40, 40], cut_off=[4])
    assert ends(decide("voted", group, Limits(max_pairs=1))) == [(2, 3)]
    # with lengths to match, 2 goes with 1, the first of the rest that is as long
    assert ends(decide("voted", group, Limits(max_pairs=1, max_length_ratio=2.0))) == [(2, 1)]


def test_voted_may_choose_a_trace_less_sure_than_the_rejected_one_where_no_gap_is_asked() -> None:
    # answer 0 wins with 0.4 + 0.4 over 0.7, yet its own traces are less sure: margin 0.4 - 0.7
    group = candidates([0.4, 0.4, 0.7], [0, 0, 1])
    assert decide("voted", group).pairs == ((0, 2, 1.0, pytest.approx(-0.3)),)
    assert decide("voted", group, Limits(min_gap=0.1)).reason == "gap_too_small"
    assert decide("voted", group, Limits(weight="gap")).reason == "gap_too_small"


def test_voted_holds_the_threshold_against_the_sum_of_the_answer() -> None:
    group = candidates([0.4, 0.4, 0.2], [0, 0, 1])
    assert ends(decide("voted", group, Limits(min_chosen=0.75))) == [(0, 2)]
    assert decide("voted", group, Limits(min_chosen=0.85)).reason == "below_min_chosen"


def test_voted_names_a_tie_of_two_answers() -> None:
    # 0.1 + 0.2 against 0.3: equal but for rounding
    assert decide("voted", candidates([0.1, 0.2, 0.3], [0, 0, 1])).reason == "tie"


def test_reversed_swaps_voted_and_skips_traces_that_were_cut_off() -> None:
    group = candidates([0.25, 0.625, 0.5, NAN], [0, 1, 0, -1], cut_off=[3])
    assert ends(decide("voted", group)) == [(2, 3), (0, 1)]
    assert decide("reversed", group).pairs == ((1, 2, 1.0, 0.125),)
    only_cut = candidates([0.25, 0.5, NAN], [0, 0, -1], cut_off=[2])
    assert ends(decide("voted", only_cut)) == [(1, 2)]
    assert decide("reversed", only_cut).reason == "all_cut_off"


def test_reversed_is_voted_turned_round_where_every_trace_is_finished() -> None:
    group = candidates([0.5, 0.25, 0.75, 0.25], [0, 1, 0, 2])
    voted, turned = decide("voted", group), decide("reversed", group)
    assert voted.pairs == ((2, 1, 1.0, 0.5), (0, 3, 1.0, 0.25))
    assert turned.pairs == ((1, 2, 1.0, -0.5), (3, 0, 1.0, -0.25))


def test_best_worst_takes_the_worst_trace_with_another_answer() -> None:
    group = candidates([0.9, 0.1, 0.3, 0.5], [0, 0, 1, 2])
    assert decide("best_worst", group).pairs == ((0, 2, 1.0, pytest.approx(0.6)),)
    assert ends(decide("best_worst", group, Limits(same_answer=True))) == [(0, 1)]


def test_best_worst_ranks_absent_scores_lowest_and_counts_them_zero_in_the_margin() -> None:
    group = candidates([0.75, 0.1, NAN], [0, 1, 0], cut_off=[2])
    assert decide("best_worst", group, Limits(weight="gap")).pairs == ((0, 2, 0.75, 0.75),)


def test_an_absent_score_ranks_below_a_score_of_zero() -> None:
    assert ends(decide("voted", candidates([0.5, 0.0, NAN], [0, 1, -1]))) == [(0, 2)]
    assert ends(decide("best_worst", candidates([0.0, NAN], [0, -1]))) == [(0, 1)]


def test_best_worst_never_chooses_a_trace_that_was_cut_off() -> None:
    # a signal of the user's own may score a trace that was cut off
    assert ends(decide("best_worst", candidates([0.9, 0.5, 0.1], [0, 1, 2], cut_off=[0]))) == [(1, 2)]


def test_all_above_gives_every_ordered_pair_above_the_threshold() -> None:
    group = candidates([0.95, 0.92, 0.5, NAN, 0.92], [0, 0, 1, -1, 1])
    authors = Limits(min_chosen=0.9, same_answer=True, weight="exp_gap")
    decision = decide("all_above", group, authors)
    # 0 over 1, 2, 3, 4; 1 and 4 over 2 and 3, not over one another (equal)
    assert sorted(ends(decision)) == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (4, 2), (4, 3)]
    weights = {(i, j): weight for i, j, weight, _ in decision.pairs}
    assert weights[0, 2] == pytest.approx(math.exp(0.45))
    assert weights[1, 3] == pytest.approx(math.exp(0.92))  # the answer was not found: score 0
    # the same without pairs inside an answer
    apart = decide("all_above", group, Limits(min_chosen=0.9))
    assert sorted(ends(apart)) == [(0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (4, 3)]


def test_all_above_keeps_the_widest_gaps_under_a_cap() -> None:
    group = candidates([0.9, 0.8, 0.1, 0.3], [0, 1, 2, 3])
    assert ends(decide("all_above", group, Limits(max_pairs=2))) == [(0, 2), (1, 2)]


def test_random_ignores_scores_and_draws_each_pair_once() -> None:
    group = candidates([0.9, 0.1, NAN, 0.5], [0, 1, -1, 2])
    limits = Limits(max_pairs=6, min_chosen=0.99, min_gap=0.99, weight="gap")
    decision = decide("random", group, limits)
    assert {frozenset(pair) for pair in ends(decision)} == {frozenset({i, j}) for i in range(4) for j in range(i)}
    assert {weight for _, _, weight, _ in decision.pairs} == {1.0}
    assert len(decide("random", group).pairs) == 1


def test_random_directions_are_even_and_repeat_with_the_seed() -> None:
    group = candidates([0.9, 0.1], [0, 1])
    drawn = [ends(decide("random", group, seed=seed))[0] for seed in range(200)]
    assert 70 <= drawn.count((0, 1)) <= 130  # 100 +- 4 standard deviations of 7
    assert drawn == [ends(decide("random", group, seed=seed))[0] for seed in range(200)]


def test_a_refined_answer_is_chosen_over_its_own_draft_where_it_scores_higher() -> None:
    group = candidates([0.2, 0.4, 0.5, 0.3, 0.1, 0.6, 0.2, 0.2], [0, 1, 2, 3, 4, 1, 5, 5])
    assert ends(decide("final_over_first", group)) == [(5, 4), (1, 0)]  # widest gap first; (2, 3) got worse
    assert ends(decide("final_over_first", group, Limits(max_pairs=1))) == [(5, 4)]
    assert decide("final_over_first", candidates([0.5, 0.3], [0, 1])).reason == "tie"
    assert decide("final_over_first", group).sure == pytest.approx(0.6)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("format_only", "final_over_first")])
@pytest.mark.parametrize(
    ("group", "limits", "reason"),
    [
        (candidates([NAN, NAN], [0, 1], cut_off=[0, 1]), Limits(), "all_cut_off"),
        (candidates([NAN, NAN], [-1, -1], cut_off=[1]), Limits(), "no_answers"),
        (candidates([0.5, 0.4], [0, 0]), Limits(), "one_answer"),
        (candidates([0.9, 0.1], [0, 1], lengths=[10, 21]), Limits(max_length_ratio=2.0), "length_ratio"),
    ],
)
def test_reason_of_a_group_without_pairs(rule: str, group: Candidates, limits: Limits, reason: str) -> None:
    assert decide(rule, group, limits).reason == reason


@pytest.mark.parametrize("rule", ["best_worst", "all_above", "voted", "reversed"])
@pytest.mark.parametrize(
    ("scores", "limits", "reason"),
    [
        ([0.5, 0.5], Limits(), "tie"),
        ([0.5, 0.4], Limits(min_chosen=0.6), "below_min_chosen"),
        ([0.5, 0.4], Limits(min_gap=0.2), "gap_too_small"),
    ],
)
def test_reason_of_a_group_whose_scores_prefer_too_little(
    rule: str, scores: list[float], limits: Limits, reason: str
) -> None:
    assert decide(rule, candidates(scores, [0, 1]), limits).reason == reason


groups = st.integers(1, 6).flatmap(
    lambda size: st.builds(
        candidates,
        scores=st.lists(st.one_of(st.floats(0, 1), st.just(NAN)), min_size=size, max_size=size),
        labels=st.lists(st.integers(-1, 2), min_size=size, max_size=size),
        lengths=st.lists(st.integers(1, 30), min_size=size, max_size=size),
        cut_off=st.lists(st.integers(0, size - 1), max_size=2),
    )
)
any_limits = st.builds(
    Limits,
    max_pairs=st.one_of(st.none(), st.integers(1, 4)),
    min_chosen=st.sampled_from([0.0, 0.5]),
    min_gap=st.sampled_from([0.0, 0.2]),
    same_answer=st.booleans(),
    max_length_ratio=st.sampled_from([None, 2.0]),
    weight=st.sampled_from(["one", "gap", "exp_gap"]),
)


@pytest.mark.parametrize("rule", RULES)
@given(group=groups, limits=any_limits)
def test_pairs_of_any_group_keep_the_rules(rule: str, group: Candidates, limits: Limits) -> None:
    decision = decide(rule, group, limits)
    for chosen, rejected, weight, margin in decision.pairs:
        assert chosen != rejected
        assert group.finished[chosen]
        assert weight > 0.0
        assert margin == pytest.approx(group.gap(chosen, rejected))
        assert limits.same_answer or group.answers[chosen] != group.answers[rejected]
        assert limits.max_length_ratio is None or max(group.lengths[[chosen, rejected]]) <= 2 * min(
            group.lengths[[chosen, rejected]]
        )
    assert len({frozenset(pair) for pair in ends(decision)}) == len(decision.pairs)
    assert limits.max_pairs is None or len(decision.pairs) <= limits.max_pairs


def test_records_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \[2, 1, 2, 2\]"):
        candidates([0.1, 0.2], [0])
    with pytest.raises(ValueError, match="either pairs or a reason"):
        Decision()


def test_format_only_prefers_answered_traces_whatever_their_scores() -> None:
    group = candidates([0.9, NAN, 0.1, NAN, 0.5], [0, -1, 1, -1, 0], cut_off=[3])
    for seed in range(5):
        decision = decide("format_only", group, seed=seed)
        assert len(decision.pairs) == 2
        assert {chosen for chosen, _ in ends(decision)} <= {0, 2, 4}
        assert {rejected for _, rejected in ends(decision)} == {1, 3}
    assert len({tuple(ends(decide("format_only", group, seed=seed))) for seed in range(9)}) > 2
    assert len(decide("format_only", group, Limits(max_pairs=1)).pairs) == 1
    assert decide("format_only", candidates([0.9, 0.1], [0, 1])).reason == "all_answered"
    assert decide("format_only", candidates([NAN, NAN], [-1, -1])).reason == "no_answers"
    lengths = candidates([0.9, NAN], [0, -1], lengths=[10, 21])
    assert decide("format_only", lengths, Limits(max_length_ratio=2.0)).reason == "length_ratio"


@pytest.mark.parametrize(
    ("rule", "sure"),
    [
        ("voted", 0.75),
        ("reversed", 0.75),
        ("best_worst", 0.5),
        ("all_above", 0.5),
        ("random", 0.0),
        ("format_only", 0.0),
    ],
)
def test_how_sure_a_rule_is_of_a_prompt(rule: str, sure: float) -> None:
    """Answer 0 has 0.5 + 0.25, answer 1 has 0.375, one trace none. A vote counts its weight, others the best trace."""
    found = RULES[rule](
        Candidates(
            scores=np.array([0.5, 0.25, 0.375, np.nan]),
            labels=np.array([0, 0, 1, -1]),
            lengths=np.array([5, 5, 5, 5]),
            finished=np.array([True] * 4),
        ),
        Limits(max_pairs=2, min_chosen=0.1),
        np.random.default_rng(0),
    )
    assert found.pairs
    assert found.sure == sure
