"""Groups in, scored groups with pairs out; then the frozen base model's log-probs for the traces in use."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rlsf_ray.algorithms.answers import label_answers
from rlsf_ray.algorithms.preferences import RULES, Candidates, Limits
from rlsf_ray.algorithms.signals import SIGNALS, Signal, TraceStats
from rlsf_ray.choices import choose
from rlsf_ray.config import RunConfig
from rlsf_ray.engines.lora import check_logits
from rlsf_ray.engines.models import load_model
from rlsf_ray.engines.packing import Row, trace_logprobs
from rlsf_ray.records import Group, Outcome, Pair, ScoredGroup, TrainingGroup, TrainingTrace
from rlsf_ray.tasks.equality import AnswerChecker


class Scorer:
    """Signals and pairs are pure functions; the model is loaded only when reference log-probs are asked for."""

    def __init__(self, config: RunConfig, *, threads: int = 0, device: str | None = None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._config, self._device = config, device
        self._signal = choose(SIGNALS, config.signal, "signal")
        self._rule = choose(RULES, config.pairs.rule, "pairs.rule")
        self._checker = AnswerChecker()
        self._model: Any = None

    def score(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        """Scores, answer classes and pairs of each group."""
        return [self._score_one(group) for group in groups]

    def _score_one(self, group: Group) -> ScoredGroup:
        answers = [trace.answer_text for trace in group.traces]
        labels = label_answers(answers, self._checker.equal)
        scores = np.asarray(self._score_function()(trace_stats(group, labels)), dtype=np.float64)
        limits = self._config.pairs
        decision = self._rule(
            Candidates(
                scores=scores,
                labels=np.asarray(labels),
                lengths=np.asarray([len(trace.token_ids) for trace in group.traces]),
                finished=np.asarray([trace.finished for trace in group.traces]),
            ),
            Limits(
                max_pairs=limits.max_pairs,
                min_chosen=limits.least_chosen(group.round),
                min_gap=limits.min_gap,
                same_answer=limits.same_answer,
                max_length_ratio=limits.max_length_ratio,
                weight=limits.weight,
            ),
            np.random.default_rng(_seed(self._config.seed, group.id)),
        )
        return ScoredGroup(
            group=group,
            signal=self._config.signal,
            scores=tuple(float(score) for score in scores),
            labels=tuple(labels),
            pairs=tuple(Pair(chosen=c, rejected=r, weight=w, margin=m) for c, r, w, m in decision.pairs),
            reason=decision.reason,
        )

    def _score_function(self) -> Any:
        return self._signal.fn if isinstance(self._signal, Signal) else self._signal

    def load(self) -> None:
        """Load the base model now, and not with the first group that has pairs."""
        if self._model is None:
            self._model = load_model(self._config.model, device=self._device)
            check_logits(self._model)

    def training_groups(self, scored: Sequence[ScoredGroup]) -> list[TrainingGroup]:
        """Groups that have pairs, reduced to the traces in use, with reference log-probs."""
        return [self._training_group(one) for one in scored if one.pairs]

    @torch.inference_mode()
    def _training_group(self, scored: ScoredGroup) -> TrainingGroup:
        self.load()
        group = scored.group
        used = sorted({index for pair in scored.pairs for index in (pair.chosen, pair.rejected)})
        row = Row(group.prompt_ids, [group.traces[k].token_ids for k in used])
        (reference,) = trace_logprobs(self._model, [row])
        return TrainingGroup(
            id=group.id,
            round=group.round,
            sequence=group.sequence,
            prompt_id=group.prompt.id,
            signal=scored.signal,
            prompt_ids=group.prompt_ids,
            traces=tuple(
                _training_trace(scored, k, values.cpu().numpy()) for k, values in zip(used, reference, strict=True)
            ),
            pairs=tuple(
                Pair(
                    chosen=used.index(pair.chosen),
                    rejected=used.index(pair.rejected),
                    weight=pair.weight,
                    margin=pair.margin,
                )
                for pair in scored.pairs
            ),
        )

    def close(self) -> None:
        self._checker.close()


def trace_stats(group: Group, labels: Sequence[int]) -> list[TraceStats]:
    """What signals may see of each trace."""
    return [
        TraceStats(
            logprob=trace.logprob,
            top1=trace.top1,
            top2=trace.top2,
            span=trace.answer.tokens if trace.answer else None,
            label=label,
            finished=trace.finished,
        )
        for trace, label in zip(group.traces, labels, strict=True)
    ]


def outcome(scored: ScoredGroup) -> Outcome:
    """The small record of how a group ended."""
    traces = scored.group.traces
    return Outcome(
        group_id=scored.group.id,
        sequence=scored.group.sequence,
        num_traces=len(traces),
        num_tokens=sum(len(trace.token_ids) for trace in traces),
        num_cut_off=sum(not trace.finished for trace in traces),
        num_parsed=sum(trace.answer is not None for trace in traces),
        num_pairs=len(scored.pairs),
        reason=scored.reason,
    )


def _training_trace(scored: ScoredGroup, index: int, reference: np.ndarray) -> TrainingTrace:
    trace = scored.group.traces[index]
    return TrainingTrace(
        id=trace.id,
        seed=trace.seed,
        version=trace.version,
        score=scored.scores[index],
        answer=trace.answer_text,
        token_ids=trace.token_ids,
        logprob=trace.logprob,
        reference_logprob=reference.astype(np.float32),
    )


def _seed(run_seed: int, group_id: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{run_seed}/{group_id}".encode()).digest()[:8], "big")
