"""Signals: the traces of one group -> one score for each trace, from statistics the engine took while generating.

K traces of a group, T tokens of one trace. An absent score is nan: the trace has no answer, or was cut off at the
token limit. Scores are comparable within a group only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
Scores = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceStats:
    """What signals may read of one trace. Probabilities are of the raw distribution (temperature 1).

    `logprob`, `top1`, `top2` [T]; `span` [start, end) are the answer's tokens; `label` is its answer class (-1: none).
    """

    logprob: FloatArray
    top1: FloatArray
    top2: FloatArray
    span: tuple[int, int] | None
    label: int
    finished: bool

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
    """Mean log-probability of all tokens of the trace, in nats; not bounded below."""
    return _each_answer(traces, lambda trace, _: float(np.mean(_float64(trace.logprob))))


def self_consistency(traces: Sequence[TraceStats]) -> Scores:
    """Share of ALL K traces that give this trace's answer, in (0, 1]. TTRL 2504.16084 and others."""
    return _share(traces, np.where(_answered(traces), 1.0, 0.0), total=float(len(traces)))


def disparity_vote(traces: Sequence[TraceStats]) -> Scores:
    """Summed disparity of the traces with this answer over that of all traces, in [0, 1]. 2402.10200, aggregation."""
    weights = np.nan_to_num(disparity(traces), nan=0.0)
    return _share(traces, weights, total=float(weights.sum()))


@dataclass(frozen=True, slots=True)
class Signal:
    """A signal's function, what it needs of a trace, and whether its scores lie in [0, 1]."""

    fn: Callable[[Sequence[TraceStats]], Scores]
    needs: frozenset[str]
    bounded: bool


_TEXT = frozenset({"text"})
SIGNALS: dict[str, Signal] = {
    "disparity": Signal(disparity, _TEXT | {"top2"}, bounded=True),
    "answer_prob": Signal(answer_prob, _TEXT | {"logprob"}, bounded=True),
    "answer_prob_mean": Signal(answer_prob_mean, _TEXT | {"logprob"}, bounded=True),
    "mean_logprob": Signal(mean_logprob, _TEXT | {"logprob"}, bounded=False),
    "self_consistency": Signal(self_consistency, _TEXT, bounded=True),
    "disparity_vote": Signal(disparity_vote, _TEXT | {"top2"}, bounded=True),
}


def _each_answer(traces: Sequence[TraceStats], score: Callable[[TraceStats, slice], float]) -> Scores:
    spans = [trace.answer_tokens for trace in traces]
    scores = [np.nan if span is None else score(trace, span) for trace, span in zip(traces, spans, strict=True)]
    return np.array(scores, dtype=np.float64)


def _share(traces: Sequence[TraceStats], weights: Scores, total: float) -> Scores:
    labels = np.array([trace.label for trace in traces])
    answered = _answered(traces)
    sums = np.array([weights[answered & (labels == label)].sum() for label in labels], dtype=np.float64)
    return np.where(answered, sums / total if total > 0.0 else 0.0, np.nan)


def _answered(traces: Sequence[TraceStats]) -> NDArray[np.bool_]:
    return np.array([trace.answer_tokens is not None for trace in traces], dtype=np.bool_)


def _float64(values: FloatArray) -> Scores:
    return values.astype(np.float64)
