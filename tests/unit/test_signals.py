"""Signals against numbers worked out by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from rlsf_ray.algorithms.signals import SIGNALS, Distribution, TraceStats, TurnStats


def trace(
    *probabilities: float,
    top: tuple[tuple[float, float], ...] | None = None,
    span: tuple[int, int] | None,
    label: int = 0,
    finished: bool = True,
) -> TraceStats:
    """A trace whose tokens have these probabilities; `top` holds (top 1, top 2) where the token is not the arg-max."""
    pairs = top or tuple((p, 1.0 - p) for p in probabilities)
    return TraceStats(
        logprob=np.log(np.array(probabilities, dtype=np.float32)),
        top1=np.array([pair[0] for pair in pairs], dtype=np.float32),
        top2=np.array([pair[1] for pair in pairs], dtype=np.float32),
        span=span,
        label=label,
        finished=finished,
        p_true=0.5 if label >= 0 else math.nan,
    )


def scores(name: str, *traces: TraceStats) -> list[float]:
    return SIGNALS[name].fn(traces).tolist()


def test_disparity_is_the_mean_gap_over_the_answer_only() -> None:
    # answer tokens 1 and 2: (0.75 - 0.25 + 1.0 - 0.0) / 2 = 0.75; token 0 is left out
    assert scores("disparity", trace(0.5, 0.75, 1.0, span=(1, 3))) == [0.75]


def test_disparity_scores_the_distribution_not_the_sampled_token() -> None:
    # the sampled token has probability 0.25, the arg-max 0.5: |0.5 - 0.25| stays
    assert scores("disparity", trace(0.25, top=((0.5, 0.25),), span=(0, 1))) == [0.25]


def test_answer_probabilities_are_the_product_and_the_mean_over_the_span() -> None:
    one = trace(0.125, 0.5, 0.25, span=(1, 3))
    assert scores("answer_prob", one) == pytest.approx([0.125])  # 0.5 * 0.25
    assert scores("answer_prob_mean", one) == pytest.approx([0.375])  # (0.5 + 0.25) / 2


def test_mean_logprob_is_over_all_tokens() -> None:
    # (ln 1/8 + ln 1/2 + ln 1/4) / 3 = -(3 + 1 + 2) ln 2 / 3 = -2 ln 2
    assert scores("mean_logprob", trace(0.125, 0.5, 0.25, span=(1, 3))) == pytest.approx([-2 * math.log(2)])


def group() -> list[TraceStats]:
    """Disparities 0.5, 0.25, 0.25, absent, absent; answers 0, 1, 0, none, 0 but cut off."""
    return [
        trace(0.75, span=(0, 1), label=0),
        trace(0.625, span=(0, 1), label=1),
        trace(0.625, span=(0, 1), label=0),
        trace(0.9, span=None, label=-1),
        trace(0.9, span=(0, 1), label=0, finished=False),
    ]


def test_self_consistency_is_the_share_of_all_traces() -> None:
    np.testing.assert_allclose(scores("self_consistency", *group()), [0.4, 0.2, 0.4, np.nan, np.nan])


def test_disparity_vote_is_the_answers_share_of_the_summed_disparity() -> None:
    # answer 0: 0.5 + 0.25 = 0.75 of 1.0; answer 1: 0.25 of 1.0
    np.testing.assert_allclose(scores("disparity_vote", *group()), [0.75, 0.25, 0.75, np.nan, np.nan])


def test_disparity_vote_without_any_disparity_is_zero() -> None:
    assert scores("disparity_vote", trace(0.5, span=(0, 1))) == [0.0]


@pytest.mark.parametrize(
    "name",
    [name for name, signal in SIGNALS.items() if "text" in signal.needs and name != "majority" and not signal.of_turns],
)
def test_score_is_absent_without_an_answer_and_for_a_trace_that_was_cut_off(name: str) -> None:
    assert np.isnan(scores(name, *group())).tolist() == [False, False, False, True, True]


@pytest.mark.parametrize("name", [name for name, signal in SIGNALS.items() if signal.bounded and not signal.of_turns])
def test_bounded_signals_stay_in_the_unit_interval(name: str) -> None:
    rng = np.random.default_rng(0)
    traces = [trace(*rng.uniform(0.5, 1.0, size=6), span=(2, 5), label=k % 3) for k in range(7)]  # no tie
    values = SIGNALS[name].fn(traces)
    assert ((values >= 0.0) & (values <= 1.0)).all()


def test_stats_of_different_lengths_and_spans_outside_the_trace_are_refused() -> None:
    with pytest.raises(ValueError, match="one length, got 1, 2, 2"):
        TraceStats(logprob=np.zeros(1, np.float32), top1=np.zeros(2, np.float32), top2=np.zeros(2, np.float32),
                   span=None, label=-1, finished=True)  # fmt: skip
    with pytest.raises(ValueError, match=r"\(1, 1\) is empty"):
        trace(0.5, 0.5, span=(1, 1))


def test_everything_but_the_losses_imports_without_torch() -> None:
    modules = [f"rlsf_ray.algorithms.{name}" for name in ("answers", "signals", "preferences", "voting", "calibration")]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def read(*rows: tuple[float, ...], finished: bool = True) -> TraceStats:
    """A trace of which only entropy, certainty and their top forms are told, one row a token."""
    columns = np.array(rows, dtype=np.float32).T
    nothing = np.zeros(len(rows), dtype=np.float32)
    seen = Distribution(nothing, nothing, nothing, *columns)
    return TraceStats(
        logprob=nothing, top1=nothing, top2=nothing, span=None, label=-1, finished=finished, distribution=seen
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [("token_entropy", -2.0), ("self_certainty", 6.0), ("top_entropy", -1.0), ("top_certainty", 4.0)],
)
def test_distribution_signals_are_means_over_the_whole_trace_and_need_no_answer(name: str, expected: float) -> None:
    # entropy, certainty, top_entropy, top_certainty of two tokens
    one, cut = read((1.0, 5.0, 0.5, 3.0), (3.0, 7.0, 1.5, 5.0)), read((1.0, 5.0, 0.5, 3.0), finished=False)
    found = scores(name, one, cut)
    assert found[0] == pytest.approx(expected)
    assert math.isnan(found[1])  # absent, not 0


def test_trajectory_logprob_is_the_sum() -> None:
    # ln 1/8 + ln 1/2 = -4 ln 2; a trace without an answer has one too
    assert scores("trajectory_logprob", trace(0.125, 0.5, span=None, label=-1)) == pytest.approx([-4 * math.log(2)])


def test_majority_gives_one_to_the_commonest_answer_and_abstains_on_a_tie() -> None:
    votes = [trace(0.5, span=(0, 1), label=label) for label in (0, 1, 1)]
    silent, cut = trace(0.5, span=None, label=-1), trace(0.5, span=(0, 1), label=0, finished=False)
    np.testing.assert_equal(scores("majority", *votes, silent, cut), [0.0, 1.0, 1.0, 0.0, 0.0])
    tied = [*votes, trace(0.5, span=(0, 1), label=0)]  # two each; the cut-off trace for 0 casts no vote
    assert np.isnan(scores("majority", *tied, cut)).all()
    assert np.isnan(scores("majority", silent)).all()
    assert np.isnan(scores("majority", votes[0], silent, cut)).all()  # one voice


def test_p_true_is_shared_among_the_answers_called_true() -> None:
    def claim(label: int, p_true: float) -> TraceStats:
        return replace(trace(0.5, span=(0, 1), label=label), p_true=p_true)

    # answers 0 and 1 are called true with 0.9 and 0.6: sum 1.5, however many traces give them
    assert scores("p_true", claim(0, 0.9), claim(0, 0.9), claim(1, 0.6)) == pytest.approx([0.6, 0.6, 0.4])
    # below 1 nothing is shared: a lone doubtful answer stays doubtful
    assert scores("p_true", claim(0, 0.2)) == pytest.approx([0.2])


def _tries(*passed: float, answers: Sequence[str | None] = ()) -> TraceStats:
    """A trace of attempts, all but the first called retries, that passed or not."""
    roles = ["attempt", *["retry"] * (len(passed) - 1)]
    written = answers or [str(n) for n in range(len(passed))]
    turns = tuple(TurnStats(*one) for one in zip(roles, written, passed, strict=True))
    return replace(trace(0.5, span=(0, 1)), turns=turns)


def test_signals_of_turns_by_hand() -> None:
    nan = float("nan")
    assert SIGNALS["passed"].fn([_tries(0, 1), _tries(1, 0), _tries(0, nan)]) == pytest.approx([1, 0, nan], nan_ok=True)
    ufo = SIGNALS["unary_feedback"].fn([_tries(1), _tries(0, 0, 1), _tries(0, 0, answers=["4", "4"])])
    assert ufo == pytest.approx([1.0, 0.25, -0.25])
    score = SIGNALS["progress"].fn([_tries(0, 1), _tries(1, 1), _tries(1, 0), _tries(1)])
    assert score == pytest.approx([11.0, 2.0, -9.0, nan], nan_ok=True)


def test_a_verdict_or_a_thought_is_no_answer() -> None:
    one = _tries(1.0)
    judged = replace(one, turns=(*one.turns, TurnStats("verdict", "yes", float("nan"))))
    assert SIGNALS["passed"].fn([judged]) == pytest.approx([1.0])
