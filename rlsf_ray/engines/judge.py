"""The model as a judge: it reads finished traces again, for what the generator's own statistics do not hold.

`live` is the version that wrote the traces, `frozen` the base model. Both lie in one set of weights: the base model
with or without the version's adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from rlsf_ray.algorithms.signals import Distribution, TraceStats, TurnStats
from rlsf_ray.config import RunConfig
from rlsf_ray.engines.distribution import read_distributions
from rlsf_ray.engines.lora import HEAD_WEIGHT, add_adapter, check_logits, load_adapter
from rlsf_ray.engines.models import load_model, load_tokenizer
from rlsf_ray.engines.objectives import rewards_of
from rlsf_ray.engines.packing import Row, in_passes, read_texts, trace_logprobs
from rlsf_ray.engines.tokens import asked_if_true, encode_prompt, encode_text
from rlsf_ray.errors import EngineError
from rlsf_ray.records import Group, IntArray

Who = Literal["live", "frozen"]
READ_BY_SCORER = frozenset({"distribution", "probe"})  # needs of a signal that no generator supplies


class Judge:
    """One base model, loaded when it is first asked, and the adapters of the versions whose traces may come."""

    def __init__(self, config: RunConfig, needs: frozenset[str], device: str | None) -> None:
        self._config, self._device = config, device
        self._needs = needs
        self._reads = {who: self._must_read(who) for who in config.judges}
        self._temperature = config.rollout.temperature if config.advantages else 1.0
        self.takes_versions = self._reads.get("live", False) or self._temperature != 1.0
        self._adapters: dict[int | Literal["reward"], Mapping[str, np.ndarray]] = {}
        self._active: int | Literal["reward"] = 0
        self._model: Any = None
        self._tokenizer: Any = None

    def _must_read(self, who: Who) -> bool:
        return bool(self._needs & READ_BY_SCORER) or (who == "frozen" and bool(self._needs - {"text"}))

    def load(self) -> None:
        """Load the base model now, and not with the first group that needs it."""
        if self._model is None:
            model = load_model(self._config.model, device=self._device)
            check_logits(model)
            if self.takes_versions or self._config.reward_model:
                model = add_adapter(model, self._config.learner, seed=0, dtype=model.dtype).eval()
            self._model = model

    def holds(self, version: int) -> bool:
        """Can it read what this version wrote?"""
        return not version or not self.takes_versions or version in self._adapters

    @property
    def has_reward(self) -> bool:
        """Is the reward model here?"""
        return "reward" in self._adapters

    def load_reward(self, weights: Mapping[str, np.ndarray]) -> None:
        """Keep the reward model: its adapter and its head."""
        self._adapters["reward"] = weights

    @torch.inference_mode()
    def rewards(self, group: Group) -> np.ndarray:
        """The reward model's score of each trace [K]; nan for a trace that was cut off."""
        self.load()
        different = _different(group)
        rows = _rows(group.prompt_ids, list(different.values()), self._config.learner.max_tokens_per_pass)
        with self._holding("reward"):
            head = torch.tensor(self._adapters["reward"][HEAD_WEIGHT][0], device=self._model.device)
            found = torch.cat([values for row in rows for values in rewards_of(self._model, head, [row])])
        of = dict(zip(different, found.double().tolist(), strict=True))
        return np.array([of[t.token_ids.tobytes()] if t.finished else np.nan for t in group.traces])

    def load_version(self, version: int, adapter: Mapping[str, np.ndarray]) -> None:
        """Keep a version's adapter, and the newest few before it."""
        if self.takes_versions:
            self._adapters[version] = adapter
            held = sorted(known for known in self._adapters if known != "reward")
            for old in held[: -(self._config.cluster.max_staleness + 2)]:
                del self._adapters[old]

    def stats(self, groups: Sequence[Group], labels: Sequence[Sequence[int]], who: Who) -> list[list[TraceStats]]:
        """What signals may see of each trace, as the generator noted it or as `who` reads it now."""
        found = [trace_stats(group, classes) for group, classes in zip(groups, labels, strict=True)]
        if not self._reads[who]:
            return found
        self.load()
        for index, (group, classes) in enumerate(zip(groups, labels, strict=True)):
            with self._holding(0 if who == "frozen" else group.version):
                if self._needs - {"text", "probe"}:
                    read = self._distributions(group)
                    found[index] = [_read_again(one, seen) for one, seen in zip(found[index], read, strict=True)]
                if "probe" in self._needs:
                    true = self._p_true(group, classes)
                    found[index] = [replace(one, p_true=true.get(one.label, math.nan)) for one in found[index]]
        return found

    def reference(self, group: Group, used: Sequence[int]) -> list[np.ndarray]:
        """The frozen base model's log-probs [T] of the tokens of some traces."""
        return self._read(group, used, 0)

    def written(self, group: Group, used: Sequence[int]) -> list[np.ndarray]:
        """The same by the policy that wrote them. What it noted is of temperature 1; else they are read again."""
        if self._temperature == 1.0:
            return [group.traces[k].logprob for k in used]
        return self._read(group, used, group.version)

    @torch.inference_mode()
    def _read(self, group: Group, used: Sequence[int], version: int) -> list[np.ndarray]:
        self.load()
        traces = [group.traces[k].token_ids for k in used]
        rows = _rows(group.prompt_ids, traces, self._config.learner.max_tokens_per_pass)
        with self._holding(version):
            found = [x for row in rows for x in trace_logprobs(self._model, [row], self._temperature)[0]]
        return [values.cpu().numpy().astype(np.float32) for values in found]

    @contextmanager
    def _holding(self, wanted: int | Literal["reward"]) -> Iterator[None]:
        """The model is a version (0: the base model) or the reward model meanwhile."""
        if not hasattr(self._model, "disable_adapter"):  # only the base model is ever asked for
            yield
        elif wanted == 0:
            with self._model.disable_adapter():
                yield
        else:
            if wanted != self._active:
                self._put(wanted)
            yield

    def _put(self, wanted: int | Literal["reward"]) -> None:
        if wanted not in self._adapters:
            what = "the reward model" if wanted == "reward" else f"version {wanted}"
            known = sorted(held for held in self._adapters if held != "reward")
            raise EngineError(f"{what} is not loaded (versions held: {known}); load it first")
        weights = self._adapters[wanted]
        load_adapter(self._model, {name: array for name, array in weights.items() if name != HEAD_WEIGHT})
        self._active = wanted

    def _distributions(self, group: Group) -> list[Distribution]:
        """Of each trace."""
        different = _different(group)
        rows = _rows(group.prompt_ids, list(different.values()), self._config.learner.max_tokens_per_pass)
        passes = in_passes(rows, self._config.learner.max_tokens_per_pass)
        read = [one for part in passes for row in read_distributions(self._model, part) for one in row]
        of = dict(zip(different, read, strict=True))
        return [of[trace.token_ids.tobytes()] for trace in group.traces]

    def _p_true(self, group: Group, labels: Sequence[int]) -> dict[int, float]:
        """p(True) / (p(True) + p(False)) as a reply to whether an answer is true; of each answer class."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._config.model)
        words = [encode_text(self._tokenizer, word) for word in ("True", "False")]
        texts, answers = list[tuple[IntArray, IntArray]](), dict[int, str]()
        for trace, label in zip(group.traces, labels, strict=True):
            if label >= 0 and trace.answer is not None:
                answers.setdefault(label, trace.answer.text)
        for answer in answers.values():
            asked = encode_prompt(self._tokenizer, self._config.model, asked_if_true(group.prompt, answer))
            texts += [(asked, word) for word in words]
        sums = [
            float(values.sum()) for values in read_texts(self._model, texts, self._config.learner.max_tokens_per_pass)
        ]
        return {label: float(1 / (1 + np.exp(sums[2 * i + 1] - sums[2 * i]))) for i, label in enumerate(answers)}


def trace_stats(group: Group, labels: Sequence[int]) -> list[TraceStats]:
    """What signals may see of each trace, by the generator that wrote it."""
    return [
        TraceStats(
            logprob=trace.logprob,
            top1=trace.top1,
            top2=trace.top2,
            span=trace.answer.tokens if trace.answer else None,
            label=label,
            finished=trace.finished,
            turns=tuple(TurnStats(turn.role, turn.answer, turn.passed) for turn in trace.turns),
        )
        for trace, label in zip(group.traces, labels, strict=True)
    ]


def _read_again(noted: TraceStats, seen: Distribution) -> TraceStats:
    return replace(noted, logprob=seen.logprob, top1=seen.top1, top2=seen.top2, distribution=seen)


def _different(group: Group) -> dict[bytes, IntArray]:
    """The traces of a group without repetitions: traces of the same tokens are read once."""
    return {trace.token_ids.tobytes(): trace.token_ids for trace in group.traces}


def _rows(prompt_ids: IntArray, traces: Sequence[IntArray], max_tokens: int) -> list[Row]:
    """The prompt with as many traces as `max_tokens` hold (one at least), and again with the next."""
    parts: list[list[IntArray]] = []
    for trace in traces:
        if parts and len(prompt_ids) + sum(map(len, parts[-1])) + len(trace) <= max_tokens:
            parts[-1].append(trace)
        else:
            parts.append([trace])
    return [Row(prompt_ids, part) for part in parts]
