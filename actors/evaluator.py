"""The only actor that sees gold answers: owns the probe set, judges, and writes what was measured."""

from __future__ import annotations

import time
from typing import Any

import ray

from actors.job import Job, event
from rlsf_ray.evaluate import cached_base, judge_groups, run_summary, store_base, summarise
from rlsf_ray.records import Json, Prompt
from rlsf_ray.tasks.equality import AnswerChecker
from rlsf_ray.tasks.sources import load_sets


class Evaluator:
    """Hands out prompts without their gold answers and judges what comes back."""

    def __init__(self, job: Job, name: str) -> None:
        self._job, self._name = job, name
        self._rows: dict[int, dict[int, list[Json]]] = {}  # version -> first sequence -> rows

    def prepare(self) -> tuple[list[Prompt], list[Prompt]]:
        """(training prompts, probe prompts)."""
        self._store = self._job.enter(self._name)
        train, self._probe = load_sets(self._store.config)
        self._checker = AnswerChecker()
        return train, [item.prompt for item in self._probe]

    def known(self, version: int, questions: int) -> bool:
        """Was this version measured on so many questions already? For the base model another run's word counts."""
        path = f"eval/version-{version:04d}.json"
        found = self._store.read_json(path)
        if found is None and version == 0:
            found = cached_base(self._store.config, self._probe)
            if found is not None:
                self._store.write_json(path, found)
        return found is not None and found["num_questions"] >= questions

    def judge(self, boxed: list[Any], version: int, first_sequence: int) -> Json:
        """Judge one batch of `Generator.probe`; returns a stage event."""
        start = time.time()
        sampled, greedy = ray.get(boxed[0], timeout=self._store.config.cluster.deadline_s)
        chunk = self._probe[first_sequence : first_sequence + len(sampled)]
        self._rows.setdefault(version, {})[first_sequence] = judge_groups(sampled, greedy, chunk, self._checker)
        return event("evaluator", self._name, "judge", max(0, version - 1), start)

    def finish(self, version: int) -> Json:
        """Every batch of this version is judged: write its evaluation, return the metrics."""
        parts = self._rows.pop(version)
        rows = [row for first in sorted(parts) for row in parts[first]]
        evaluation = summarise(rows, version, self._store.config)
        if version == 0 and len(rows) == len(self._probe):
            store_base(self._store.config, self._probe, evaluation)
        self._store.write_json(f"eval/version-{version:04d}.json", evaluation)
        metrics: Json = evaluation["metrics"]
        return metrics

    def summary(self, measured: Json) -> Json:
        """Write summary.json and the report of the finished run; returns the summary."""
        from rlsf_ray.report import write_report

        summary = run_summary(self._store, **measured)
        write_report(self._store)
        return summary
