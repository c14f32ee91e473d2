"""Where a run stands: rounds, versions, accounting and counters; what state.json holds and `rlsf status` shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from time import time

from rlsf_ray.config import RunConfig
from rlsf_ray.records import Json, Outcome
from rlsf_ray.stream.admission import Admission
from rlsf_ray.stream.ledger import PAIRS, Ledger


class RunState:
    """One run's bookkeeping. It holds counts and reasons, never tokens."""

    def __init__(
        self, run: str, config: RunConfig, saved: Json | None = None, clock: Callable[[], float] = time
    ) -> None:
        saved = saved or {}
        self.run, self._config, self._clock = run, config, clock
        self.admission = Admission(config.cluster.max_staleness)
        for round, version in saved.get("ended", ()):
            self.admission.end_round(round, version)
        self._ended: list[list[int | None]] = list(saved.get("ended", ()))
        self.ledger = Ledger.from_json(saved.get("ledger", {}))
        self.counts = {"traces": 0, "tokens": 0, "pairs": 0, "parsed": 0, "cut_off": 0, "steps": 0}
        self.counts |= saved.get("counts", {})
        self.state: str = saved.get("state", "starting")
        self.message = ""
        self.error: Json | None = None  # what ended the run in failure: {"type", "text"}
        self.prompts_per_round = config.prompts_per_round  # a small training set has fewer
        self.round = self.admission.rounds_ended
        self._seconds_before: float = saved.get("seconds", 0.0)
        self._started = clock()
        self._traces_before = self.counts["traces"]

    def scored(self, round: int, outcomes: Sequence[Outcome]) -> None:
        """A batch came back from a scorer."""
        self.ledger.scored(round, outcomes)
        self.counts["traces"] += sum(outcome.num_traces for outcome in outcomes)
        self.counts["tokens"] += sum(outcome.num_tokens for outcome in outcomes)
        self.counts["pairs"] += sum(outcome.num_pairs for outcome in outcomes)
        self.counts["parsed"] += sum(outcome.num_parsed for outcome in outcomes)
        self.counts["cut_off"] += sum(outcome.num_cut_off for outcome in outcomes)

    def committed(self, round: int, version: int, sequences: Sequence[int]) -> None:
        """The checkpoint of `round` is saved and holds exactly the groups with pairs.

        Raises ValueError if the trainer and the scorers disagree about which groups those are.
        """
        waiting = set(self.ledger.sequences(round, PAIRS))
        if not waiting <= set(sequences):
            raise ValueError(
                f"round {round}: groups {sorted(waiting - set(sequences))} have pairs but were not trained"
            )
        self.ledger.trained(round, sequences)
        self._end(round, version)

    def had_no_pairs(self, round: int) -> None:
        """Every prompt of `round` was filtered or failed."""
        self._end(round, None)

    def _end(self, round: int, version: int | None) -> None:
        self.admission.end_round(round, version)
        self._ended.append([round, version])

    def reasons(self) -> Counter[str]:
        """Why prompts gave no pairs, counted."""
        return Counter(self.ledger.totals()["reasons"])

    @property
    def seconds(self) -> float:
        """Run time so far, over all lives of the run."""
        return self._seconds_before + self._clock() - self._started

    def recovered(self, round: int, pairs: Mapping[int, int], reasons: Mapping[int, str]) -> None:
        """Sequences of a round that were scored before a crash: their number of pairs, or why they have none."""
        found = {sequence: reasons.get(sequence) for sequence in (*pairs, *reasons)}
        for sequence in self.ledger.recovered(round, found):
            self.counts["traces"] += self._config.rollout.traces
            self.counts["pairs"] += pairs.get(sequence, 0)
        self._traces_before = self.counts["traces"]

    def _seconds_left(self, scored: float) -> float | None:
        """From the share of prompts that are `scored` and the share of optimiser steps done, half and half.

        How many steps there will be is guessed from the pairs so far.
        """
        learner = self._config.learner
        expected = self.counts["pairs"] / scored * learner.epochs / learner.pairs_per_step if scored else 0.0
        if not expected:
            return None
        share = (scored + min(1.0, self.counts["steps"] / expected)) / 2
        return self.seconds * (1.0 / share - 1.0)

    def to_json(self) -> Json:
        return {
            "state": self.state,
            "error": self.error,
            "ended": self._ended,
            "version": self.admission.newest,
            "ledger": self.ledger.to_json(),
            "counts": self.counts,
            "seconds": self.seconds,
        }

    def status(self) -> Json:
        """What a progress display shows; the same keys as loop.py's."""
        config, accounting = self._config, self.ledger.totals()
        total = config.rounds * self.prompts_per_round
        done = accounting["admitted"] - accounting["in_flight"]
        waiting = sum(len(self.ledger.sequences(round, PAIRS)) for round in range(config.rounds))
        elapsed = self._clock() - self._started
        return {
            "run": self.run,
            "state": self.state,
            "round": min(self.round, config.rounds - 1),
            "rounds": config.rounds,
            "version": self.admission.newest,
            "prompts_done": done + waiting,  # written and scored
            "prompts_total": total,
            "traces": self.counts["traces"],
            "traces_per_s": (self.counts["traces"] - self._traces_before) / elapsed if elapsed > 0 else 0.0,
            "pairs": self.counts["pairs"],
            "steps": self.counts["steps"],
            "eta_s": self._seconds_left((done + waiting) / total),
            "accounting": accounting,
            "message": self.message,
        }
