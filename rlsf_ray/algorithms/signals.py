"""Signals: the traces of one group -> one score for each trace, from statistics of the traces' tokens.

K traces of a group, T tokens of one trace. An absent score is nan: the trace was cut off at the token limit or, where
the signal is about answers, has none. Scores are comparable within a group only. A signal says what it needs:

    text, logprob, top2   the engine gives them while it writes: free
    distribution          one reading of the finished trace by the scorer, over the whole vocabulary
    probe                 one reading of a question about the answer, by the scorer
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlsf_ray.algorithms.answers import ANSWERING, normalise

FloatArray = NDArray[np.float32]
Scores = NDArray[np.float64]
TOP = 20  # tokens of the `top_` statistics, which are other quantities than those over the whole vocabulary


class Distribution(NamedTuple):
    """Statistics [T] of the distributions that a trace's tokens were drawn from, at temperature 1, in nats.

    `certainty` is KL(U || p) for the uniform U over the vocabulary; the `top_` ones are of the TOP likeliest tokens,
    their probabilities made to sum to 1.
    """

    logprob: FloatArray
    top1: FloatArray
    top2: FloatArray
    entropy: FloatArray
    certainty: FloatArray
    top_entropy: FloatArray
    top_certainty: FloatArray


class TurnStats(NamedTuple):
    """What signals may read of one turn: `passed` is 1 or 0 by a check, nan where there was none or it failed."""

    role: str
    answer: str | None
    passed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceStats:
    """What signals may read of one trace. Probabilities are of the raw distribution (temperature 1).

    `logprob`, `top1`, `top2` [T]; `span` [start, end) are the answer's tokens; `label` is its answer class (-1: none).
    `distribution` and `p_true` are there for a signal that needs them; `p_true` is nan without an answer. `turns` are
    there in rollouts of several.
    """

    logprob: FloatArray
    top1: FloatArray
    top2: FloatArray
    span: tuple[int, int] | None
    label: int
    finished: bool
    distribution: Distribution | None = None
    p_true: float = float("nan")
    turns: tuple[TurnStats, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.logprob) == len(self.top1) == len(self.top2):
            raise ValueError(
                f"logprob, top1, top2 must have one length, got {len(self.logprob)}, {len(self.top1)}, {len(self.top2)}"
            )
        if self.span is not None and not 0 <= self.span[0] < self.span[1] <= len(self.logprob):
            raise ValueError(f"answer span {self.span} is empty or outside {len(self.logprob)} tokens")

    @property
    def answer_tokens(self) -> slice | None:
        """The answer's tokens. A trace that was cut off has no answer, whatever its text holds."""
        return slice(*self.span) if self.finished and self.span is not None and self.label >= 0 else None


def disparity(traces: Sequence[TraceStats]) -> Scores:
    """Mean over the answer's tokens of p(top 1) - p(top 2), in [0, 1]. RLSF 2507.21931 and CoT-decoding 2402.10200.

    It scores the distribution: where a sampled token is not the arg-max, the arg-max's probability is still used.
    """
    return _each_answer(traces, lambda trace, span: float(np.mean(_float64(trace.top1 - trace.top2)[span])))


def answer_prob(traces: Sequence[TraceStats]) -> Scores:
    """Probability of the answer's tokens given the text before them: the product over the span, in [0, 1]."""
    return _each_answer(traces, lambda trace, span: float(np.exp(np.sum(_float64(trace.logprob)[span]))))


def answer_prob_mean(traces: Sequence[TraceStats]) -> Scores:
    """Mean probability of the answer's tokens, in [0, 1]. CRew 2510.13501."""
    return _each_answer(traces, lambda trace, span: float(np.mean(np.exp(_float64(trace.logprob)[span]))))


def mean_logprob(traces: Sequence[TraceStats]) -> Scores:
    """Mean log-probability of the trace's tokens, in nats. PRISM's trajectory entropy, negated."""
    return _each_finished(traces, lambda trace: np.mean(_float64(trace.logprob)))


def trajectory_logprob(traces: Sequence[TraceStats]) -> Scores:
    """Log-probability of the whole trace, in nats. EM-RL-sequence 2505.15134, RLIF 2506.17219; favours short traces."""
    return _each_finished(traces, lambda trace: np.sum(_float64(trace.logprob)))


def token_entropy(traces: Sequence[TraceStats]) -> Scores:
    """Minus the mean entropy of the tokens' distributions, in nats. RENT 2505.22660, RLIF 2506.17219."""
    return _each_finished(traces, lambda trace: -np.mean(_float64(_read(trace).entropy)))


def self_certainty(traces: Sequence[TraceStats]) -> Scores:
    """Mean KL(U || p) over the tokens, in nats. 2502.18581; the reward of Intuitor 2505.19590.

    Not minus the entropy, which is log V - KL(p || U): it is ruled by how unlikely the unlikely tokens are.
    """
    return _each_finished(traces, lambda trace: np.mean(_float64(_read(trace).certainty)))


def top_entropy(traces: Sequence[TraceStats]) -> Scores:
    """`token_entropy` over the TOP likeliest tokens: another quantity, blind to the tail."""
    return _each_finished(traces, lambda trace: -np.mean(_float64(_read(trace).top_entropy)))


def top_certainty(traces: Sequence[TraceStats]) -> Scores:
    """`self_certainty` over the TOP likeliest tokens: another quantity, blind to the tail."""
    return _each_finished(traces, lambda trace: np.mean(_float64(_read(trace).top_certainty)))


def p_true(traces: Sequence[TraceStats]) -> Scores:
    """Probability that the model calls the answer true, over the sum for all the group's answers where that exceeds 1.

    P(True) 2207.05221; the division is this project's own. The other answers are the distractors: a model that calls
    everything true is sure of nothing. Where all traces agree there is no distractor, and its leaning to yes stays.
    """
    found = {trace.label: trace.p_true for trace in traces if trace.answer_tokens is not None}
    whole = max(1.0, float(np.nansum(list(found.values()))))
    return _each_answer(traces, lambda trace, _: trace.p_true / whole)


def majority(traces: Sequence[TraceStats]) -> Scores:
    """1 for the commonest answer, 0 for others and none (a trace that was cut off has none); all absent without a vote.

    TTRL 2504.16084, SRT 2505.21444.

    A tie is no vote (TTRL would draw one), nor is one voice: with K different answers, or one among the silent, nothing
    speaks for any of them. `self_consistency` is its soft form among those that answer: the others take no part there.
    """
    answered = _answered(traces)
    labels = np.array([trace.label for trace in traces])
    found, counts = np.unique(labels[answered], return_counts=True)
    if not len(found) or counts.max() < 2 or (counts == counts.max()).sum() > 1:
        return np.full(len(traces), np.nan)
    return np.where(answered & (labels == found[counts.argmax()]), 1.0, 0.0)


def passed(traces: Sequence[TraceStats]) -> Scores:
    """1 if the last answer passes its check, 0 if not; absent where it was not, or could not be, checked.

    Reflect, Retry, Reward 2505.24726.
    """
    return np.array([_outcome(trace) for trace in traces], dtype=np.float64)


def unary_feedback(traces: Sequence[TraceStats]) -> Scores:
    """2^-n if the n-th attempt (from 0) passes, less half the share of repeated answers. UFO 2507.14295."""

    def score(trace: TraceStats) -> float:
        answers = [normalise(turn.answer) for turn in trace.turns if turn.answer is not None]
        right = _outcome(trace) * 0.5 ** (len(trace.turns) - 1)
        return right - 0.5 * (1.0 - len(set(answers)) / len(answers) if answers else 0.0)

    return np.array([score(trace) for trace in traces], dtype=np.float64)


def progress(traces: Sequence[TraceStats]) -> Scores:
    """First plus second try, plus 10 times the progress between them. SCoRe 2409.12917, stage II.

    One return for both tries; a first try is not told apart from what its second made of it.
    """
    tries = [[turn.passed for turn in trace.turns if turn.role in ANSWERING] for trace in traces]
    return np.array([one[0] + one[-1] + 10.0 * (one[-1] - one[0]) if len(one) == 2 else np.nan for one in tries])


def self_consistency(traces: Sequence[TraceStats]) -> Scores:
    """Share of ALL K traces that give this trace's answer, in (0, 1]. EMPO 2504.05812's cluster share, and others."""
    return _share(traces, np.where(_answered(traces), 1.0, 0.0), total=float(len(traces)))


def disparity_vote(traces: Sequence[TraceStats]) -> Scores:
    """Summed disparity of the traces with this answer over that of all traces, in [0, 1]. 2402.10200, aggregation."""
    weights = np.nan_to_num(disparity(traces), nan=0.0)
    return _share(traces, weights, total=float(weights.sum()))


@dataclass(frozen=True, slots=True)
class Signal:
    """A signal's function, what it needs of a trace, whether its scores lie in [0, 1] and are about its turns."""

    fn: Callable[[Sequence[TraceStats]], Sequence[float] | Scores]
    needs: frozenset[str] = frozenset({"text", "logprob", "top2"})
    bounded: bool = False
    of_turns: bool = False

    def __post_init__(self) -> None:
        if odd := self.needs - {"text", "logprob", "top2", "distribution", "probe"}:
            raise ValueError(f"a signal cannot need {sorted(odd)}; expected text, logprob, top2, distribution or probe")


_TEXT = frozenset({"text"})
_LOGPROB, _DISTRIBUTION = frozenset({"logprob"}), frozenset({"distribution"})
SIGNALS: dict[str, Signal] = {
    "disparity": Signal(disparity, _TEXT | {"top2"}, bounded=True),
    "answer_prob": Signal(answer_prob, _TEXT | {"logprob"}, bounded=True),
    "answer_prob_mean": Signal(answer_prob_mean, _TEXT | {"logprob"}, bounded=True),
    "mean_logprob": Signal(mean_logprob, _LOGPROB, bounded=False),
    "trajectory_logprob": Signal(trajectory_logprob, _LOGPROB, bounded=False),
    "token_entropy": Signal(token_entropy, _DISTRIBUTION, bounded=False),
    "self_certainty": Signal(self_certainty, _DISTRIBUTION, bounded=False),
    "top_entropy": Signal(top_entropy, _DISTRIBUTION, bounded=False),
    "top_certainty": Signal(top_certainty, _DISTRIBUTION, bounded=False),
    "p_true": Signal(p_true, _TEXT | {"probe"}, bounded=True),
    "majority": Signal(majority, _TEXT, bounded=True),
    "self_consistency": Signal(self_consistency, _TEXT, bounded=True),
    "disparity_vote": Signal(disparity_vote, _TEXT | {"top2"}, bounded=True),
    "passed": Signal(passed, _TEXT, bounded=True, of_turns=True),
    "unary_feedback": Signal(unary_feedback, _TEXT, of_turns=True),
    "progress": Signal(progress, _TEXT, of_turns=True),
}


def _each_answer(traces: Sequence[TraceStats], score: Callable[[TraceStats, slice], float]) -> Scores:
    spans = [trace.answer_tokens for trace in traces]
    scores = [np.nan if span is None else score(trace, span) for trace, span in zip(traces, spans, strict=True)]
    return np.array(scores, dtype=np.float64)


def _each_finished(traces: Sequence[TraceStats], score: Callable[[TraceStats], np.floating]) -> Scores:
    """A trace that was cut off has no score, and takes no part: DAPO 2503.14476, overlong filtering."""
    return np.array([float(score(trace)) if trace.finished else np.nan for trace in traces], dtype=np.float64)


def _outcome(trace: TraceStats) -> float:
    return next((turn.passed for turn in reversed(trace.turns) if turn.role in ANSWERING), float("nan"))


def _read(trace: TraceStats) -> Distribution:
    assert trace.distribution is not None, "this signal needs the distribution"
    return trace.distribution


def _share(traces: Sequence[TraceStats], weights: Scores, total: float) -> Scores:
    labels = np.array([trace.label for trace in traces])
    answered = _answered(traces)
    sums = np.array([weights[answered & (labels == label)].sum() for label in labels], dtype=np.float64)
    return np.where(answered, sums / total if total > 0.0 else 0.0, np.nan)


def _answered(traces: Sequence[TraceStats]) -> NDArray[np.bool_]:
    return np.array([trace.answer_tokens is not None for trace in traces], dtype=np.bool_)


def _float64(values: FloatArray) -> Scores:
    return values.astype(np.float64)
