"""The only actor that sees gold answers: owns the probe set, judges, and writes what was measured."""

from __future__ import annotations

import time
from typing import Any

import ray

from actors.job import Job, event
from rlsf_ray.base_cache import cached_base, store_base
from rlsf_ray.evaluate import judge_groups, look_at, run_summary, summarise
from rlsf_ray.feeds import Feed, keep_feed, new_feed, read_feeds
from rlsf_ray.plan import check_prompts
from rlsf_ray.records import Group, Json, Prompt
from rlsf_ray.tasks.equality import AnswerChecker
from rlsf_ray.tasks.sources import load_sets


class Evaluator:
    """Hands out prompts without their gold answers and judges what comes back."""

    def __init__(self, job: Job, name: str) -> None:
        self._job, self._name = job, name
        self._rows: dict[int, dict[int, list[Json]]] = {}  # version -> first sequence -> rows
        self._groups: dict[int, dict[int, list[Group]]] = {}  # the same, of calibration prompts

    def prepare(self) -> tuple[list[Prompt], list[Prompt], list[Prompt], list[Feed]]:
        """(training prompts, probe prompts, calibration prompts, what the run was fed)."""
        self._store = self._job.enter(self._name)
        self._sets = load_sets(self._store.config)
        self._checker = AnswerChecker()
        feeds = read_feeds(self._store, self._sets)
        return self._sets.train, [item.prompt for item in self._sets.probe], self._sets.calibration, feeds

    def feed(self, name: str, data: bytes, first_round: int) -> Feed:
        """Keep the prompts of a file for `first_round` on. Raises InputError if the run could not train on them."""
        feed = new_feed(self._store, self._sets, name, data, first_round)
        check_prompts(self._store.config, feed.prompts)
        keep_feed(self._store, name, data, first_round)
        return feed

    def known(self, version: int, questions: int) -> tuple[bool, Json | None]:
        """(was this version measured on so many questions already?, the vitals it had then).

        For the base model another run's word counts.
        """
        found = self._store.measured(version, questions)
        if found is None and version == 0:
            found = cached_base(self._store.config, self._sets)
            if found is not None:
                self._store.write_evaluation(found)
        return found is not None, found and found["vitals"]

    def judge(self, boxed: list[Any], version: int, first_sequence: int) -> Json:
        """Judge one batch of `Generator.probe`; returns a stage event."""
        start = time.time()
        written = ray.get(boxed[0], timeout=self._store.config.cluster.deadline_s)
        chunk = self._sets.probe[first_sequence : first_sequence + len(written["greedy"])]
        self._rows.setdefault(version, {})[first_sequence] = judge_groups(written, chunk, self._checker)
        return event("evaluator", self._name, "judge", max(0, version - 1), start)

    def collect(self, boxed: list[Any], version: int, first_sequence: int) -> Json:
        """Take in one batch of `Generator.calibrate`; returns a stage event."""
        start = time.time()
        groups = ray.get(boxed[0], timeout=self._store.config.cluster.deadline_s)
        self._groups.setdefault(version, {})[first_sequence] = groups
        return event("evaluator", self._name, "collect", max(0, version - 1), start)

    def finish(self, version: int) -> Json | None:
        """Every batch of this version is there: write its evaluation, return the guard's vitals."""
        parts, groups = self._rows.pop(version, {}), self._groups.pop(version, {})
        rows = [row for first in sorted(parts) for row in parts[first]]
        ordered = [group for first in sorted(groups) for group in groups[first]]
        unlabelled = look_at(ordered, self._store.earlier_answers(version), self._checker)
        evaluation = summarise(rows, version, self._store.config, unlabelled)
        if version == 0 and len(rows) == len(self._sets.probe):
            store_base(self._store.config, self._sets, evaluation)
        self._store.write_evaluation(evaluation)
        vitals: Json | None = evaluation["vitals"]
        return vitals

    def summary(self, measured: Json) -> Json:
        """Write summary.json and the report of the finished run; returns the summary."""
        from rlsf_ray.report import write_report

        summary = run_summary(self._store, **measured)
        write_report(self._store)
        return summary
