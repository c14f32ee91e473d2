"""Groups in, scored groups with pairs out; then the frozen base model's log-probs for the traces in use."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rlsf_ray.algorithms import advantages
from rlsf_ray.algorithms.answers import label_answers
from rlsf_ray.algorithms.preferences import RULES, Candidates, Limits
from rlsf_ray.algorithms.signals import SIGNALS, Signal, TraceStats
from rlsf_ray.choices import choose
from rlsf_ray.config import RunConfig
from rlsf_ray.engines.judge import Judge
from rlsf_ray.errors import InputError
from rlsf_ray.records import Group, Outcome, Pair, ScoredGroup, TrainingGroup, TrainingTrace
from rlsf_ray.tasks.checks import equality
from rlsf_ray.tasks.equality import AnswerChecker


class Scorer:
    """Signals and pairs are pure functions; the model is loaded only when one of its judgements is asked for."""

    def __init__(self, config: RunConfig, *, threads: int = 0, device: str | None = None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._config = config
        chosen = choose(SIGNALS, config.signal, "signal")
        self._signal = chosen if isinstance(chosen, Signal) else Signal(chosen)
        self._rule = choose(RULES, config.pairs.rule, "pairs.rule")
        self._credit: advantages.Rule | None = None
        if config.advantages is not None:
            self._credit = choose(advantages.RULES, config.advantages.rule, "advantages.rule")
        self._checker = AnswerChecker()
        self.judge = Judge(config, self._signal.needs, device)

    def score(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        """Scores, answer classes and pairs of each group."""
        labels = [
            label_answers([trace.answer_text for trace in group.traces], equality(group.prompt, self._checker))
            for group in groups
        ]
        return [self._decide(*one) for one in zip(groups, labels, self._scores(groups, labels), strict=True)]

    def _scores(self, groups: Sequence[Group], labels: Sequence[Sequence[int]]) -> list[list[np.ndarray]]:
        """Of each group, by each judge [K]."""
        if groups and self._rewarded(groups[0]):
            return [[self.judge.rewards(group)] for group in groups]
        by_judge = [
            [self._scores_of(stats) for stats in self.judge.stats(groups, labels, who)] for who in self._config.judges
        ]
        return [list(scores) for scores in zip(*by_judge, strict=True)]

    def _scores_of(self, stats: Sequence[TraceStats]) -> np.ndarray:
        scores = np.asarray(self._signal.fn(stats), dtype=np.float64)
        if scores.shape != (len(stats),) or np.isinf(scores).any():
            raise InputError(
                f"signal {self._config.signal} gave {scores.tolist()} for a group of {len(stats)} traces, expected a"
                " finite number for each, or nan where there is none; correct it"
            )
        return scores

    def _rewarded(self, group: Group) -> bool:
        """Does the reward model score this round?"""
        return self._config.reward_model is not None and not self._config.trains_reward(group.round)

    def _decide(self, group: Group, labels: Sequence[int], by_judge: Sequence[np.ndarray]) -> ScoredGroup:
        """The first judge's scores count; a second's are kept beside them."""
        scores, *others = by_judge
        if self._credit is None or self._config.has_pairs(group.round):
            learned = self._pairs(group, labels, scores)
        else:
            learned = self._advantages(group, scores, self._credit)
        return ScoredGroup(
            group=group,
            signal="reward" if self._rewarded(group) else self._config.signal,
            scores=tuple(float(score) for score in scores),
            second_scores=tuple(float(score) for score in others[0]) if others else None,
            labels=tuple(labels),
            **learned,
        )

    def _advantages(self, group: Group, scores: np.ndarray, rule: advantages.Rule) -> dict[str, Any]:
        roles = self._config.advantages.turns if self._config.advantages else ()
        scores = np.where([trace.written(roles).any() for trace in group.traces], scores, np.nan)
        found = advantages.credit(scores, np.asarray([trace.finished for trace in group.traces]), rule)
        if found.reason and len(group.traces) == 1 and (turns := group.traces[0].turns):  # a rollout that did not go on
            return {"reason": "passed_at_once" if turns[-1].passed == 1.0 else "check_failed"}
        return {"advantages": found.advantages, "reason": found.reason}

    def _pairs(self, group: Group, labels: Sequence[int], scores: np.ndarray) -> dict[str, Any]:
        limits = self._config.pairs
        # Of checks, an absent score says that one could not be made: such a trace is no worse than others. From absent
        # ones a reward model would learn that a trace ends and has an answer, which is not what it will be asked
        taken, scored = np.arange(len(scores)), np.flatnonzero(~np.isnan(scores))
        if self._signal.of_turns or (self._config.trains_reward(group.round) and len(scored)):
            taken = scored
        if not len(taken):
            return {"reason": "check_failed"}
        decision = self._rule(
            Candidates(
                scores=scores[taken],
                labels=np.asarray(labels)[taken],
                lengths=np.asarray([len(group.traces[k].token_ids) for k in taken]),
                finished=np.asarray([group.traces[k].finished for k in taken]),
            ),
            Limits(
                max_pairs=limits.max_pairs,
                min_chosen=limits.min_chosen,
                min_gap=limits.min_gap,
                same_answer=limits.same_answer,
                max_length_ratio=limits.max_length_ratio,
                weight=limits.weight,
            ),
            np.random.default_rng(_seed(self._config.seed, group.id)),
        )
        pairs = tuple(
            Pair(chosen=int(taken[c]), rejected=int(taken[r]), weight=w, margin=m) for c, r, w, m in decision.pairs
        )
        return {"pairs": pairs, "reason": decision.reason, "sure": decision.sure}

    def training_groups(self, scored: Sequence[ScoredGroup]) -> list[TrainingGroup]:
        """Groups that something is learned from, reduced to the traces in use, with reference log-probs."""
        return [self._training_group(one) for one in scored if one.reason is None]

    def _training_group(self, scored: ScoredGroup) -> TrainingGroup:
        group = scored.group
        used = sorted({index for pair in scored.pairs for index in (pair.chosen, pair.rejected)})
        used = used or [k for k, advantage in enumerate(scored.advantages) if not math.isnan(advantage)]
        read = zip(used, self.judge.written(group, used), self.judge.reference(group, used), strict=True)
        return TrainingGroup(
            id=group.id,
            round=group.round,
            sequence=group.sequence,
            prompt_id=group.prompt.id,
            signal=scored.signal,
            sure=scored.sure,
            prompt_ids=group.prompt_ids,
            traces=tuple(
                _training_trace(scored, k, written, reference, self._credit_of(scored, k))
                for k, written, reference in read
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

    def _credit_of(self, scored: ScoredGroup, index: int) -> np.ndarray | None:
        """What each token of a trace counts [T]; None: 1."""
        trace, settings = scored.group.traces[index], self._config.advantages
        if not scored.advantages or settings is None:
            return np.where(trace.written(), 1.0, np.nan).astype(np.float32) if trace.turns else None
        credit = np.where(trace.written(settings.turns), scored.advantages[index], np.nan).astype(np.float32)
        if settings.held_turns:
            credit[trace.written(settings.held_turns)] = 0.0
        return credit

    def close(self) -> None:
        self._checker.close()


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
        num_examples=len(scored.pairs) or sum(not math.isnan(a) for a in scored.advantages),
        reason=scored.reason,
    )


def _training_trace(
    scored: ScoredGroup, index: int, written: np.ndarray, reference: np.ndarray, credit: np.ndarray | None
) -> TrainingTrace:
    trace = scored.group.traces[index]
    return TrainingTrace(
        id=trace.id,
        seed=trace.seed,
        version=trace.version,
        score=scored.scores[index],
        answer=trace.answer_text,
        token_ids=trace.token_ids,
        logprob=written,
        reference_logprob=reference,
        credit=credit,
    )


def _seed(run_seed: int, group_id: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{run_seed}/{group_id}".encode()).digest()[:8], "big")
