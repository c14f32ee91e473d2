"""Where a run stands: rounds, versions, accounting and counters; what state.json holds and `rlsf status` shows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from time import time

from rlsf_ray.config import RunConfig
from rlsf_ray.errors import DrainedError, GuardError, InputError, NoPairsError, RlsfError, ServiceError
from rlsf_ray.records import Json, Outcome
from rlsf_ray.stream.admission import Admission
from rlsf_ray.stream.guard import Action, Guard, Vitals, low_entropy
from rlsf_ray.stream.ledger import PAIRS, Ledger

logger = logging.getLogger(__name__)

NEARLY_FULL = 0.9  # of a disk
PART = 0.125  # of the step that the guard stopped at, as where to go back to: benchmarks/results/log.md says why


@dataclass(frozen=True, slots=True)
class Back:
    """Where a run goes back to: so great a share of the way from version `to` to version `past`."""

    to: int
    past: int | None
    share: float

    @property
    def newest(self) -> int:
        """The newest version that has a part in it."""
        return self.past if self.past is not None and self.share else self.to


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
        kinds = {self._examples(round): 0 for round in range(config.rounds)}
        self.counts = {"traces": 0, "tokens": 0, **kinds, "parsed": 0, "cut_off": 0, "steps": 0}
        self.counts |= saved.get("counts", {})
        self.state: str = saved.get("state", "starting")
        self.message = ""
        self.guard = Guard(saved.get("guard", ()))
        self._training_vitals: dict[str, Json] = dict(saved.get("training_vitals", {}))
        self.verdicts: list[Json] = list(saved.get("verdicts", ()))  # of the guard, where it had something to say
        self.asked_back: int | None = saved.get("asked_back")  # the version that somebody wants to go back to
        self.rolled_back: Json | None = saved.get("rolled_back")  # {"from", "past", "to", "share", "version"}
        self.swaps: dict[str, Json] = {}  # generator -> its last swap in this life
        self._disk_used: float | None = None
        self.news: list[Json] = []  # {"event", "text"} of this life that nobody has been told yet
        self.peak_memory_gb: float | None = saved.get("peak_memory_gb")  # of all processes, where the driver measures
        self.error: Json | None = None  # what ended the run in failure: {"type", "text"}
        self.prompts_per_round = config.prompts_per_round  # a small training set has fewer
        self.round = self.admission.rounds_ended
        self._seconds_before: float = saved.get("seconds", 0.0)
        self._started = clock()
        self.work_begins()

    def work_begins(self) -> None:
        """Traces per second count what comes from here on."""
        self._traces_before = self.counts["traces"]

    def scored(self, round: int, outcomes: Sequence[Outcome]) -> None:
        """A batch came back from a scorer."""
        self.ledger.scored(round, outcomes)
        self._count(round, outcomes)

    def _examples(self, round: int) -> str:
        """What the round learns from."""
        return "pairs" if self._config.has_pairs(round) else "credited traces"

    def _count(self, round: int, outcomes: Iterable[Outcome]) -> None:
        for outcome in outcomes:
            self.counts[self._examples(round)] += outcome.num_examples
            for name in ("traces", "tokens", "parsed", "cut_off"):
                self.counts[name] += getattr(outcome, f"num_{name}")

    def committed(
        self, round: int, version: int | None, sequences: Sequence[int], vitals: Json, left_out: Mapping[int, int]
    ) -> None:
        """The checkpoint of `round` is saved and holds exactly the groups with pairs; `training_vitals` of the round.

        `version` None: it is that of a reward model. `left_out`: {sequence: pairs} of groups that were not sure enough.
        Raises ValueError if the trainer and the scorers disagree about which groups those are.
        """
        waiting = set(self.ledger.sequences(round, PAIRS))
        if missing := waiting - set(sequences) - left_out.keys():
            raise ValueError(f"round {round}: groups {sorted(missing)} have pairs but were not trained")
        self.ledger.trained(round, sequences)
        self.ledger.left_out(round, left_out)
        self.counts[self._examples(round)] -= sum(left_out.values())
        if version is not None:
            self._training_vitals[str(version)] = vitals
        self._end(round, version)

    def swapped(self, swap: Json) -> None:
        """A generator has loaded a version: what it proved."""
        keys = ("version", "verdict", "share", "expected_move", "gap", "loads")
        self.swaps[swap["actor"]] = {key: swap[key] for key in keys}
        if swap["loads"] > 1:
            text = f"{swap['actor']} had to load version {swap['version']} {swap['loads']} times: {swap['verdict']}"
            self.news.append({"event": "quarantine", "text": text})

    def on_disk(self, used: float | None) -> None:
        """The share of the run directory's disk that is in use; None: not known. A full one is news once."""
        before, self._disk_used = self._disk_used or 0.0, used
        if used is not None and used >= NEARLY_FULL > before:
            text = f"the disk of the run directory is {used:.0%} full"
            self.news.append({"event": "disk", "text": text})
            logger.warning("%s: make room there; a run that finds none ends, and can be resumed", text)

    def judged(self, version: int, vitals: Json | None) -> Action:
        """What the guard says of a version that was looked at. Raises GuardError if that is to stop the run."""
        first = vitals is not None and version == 0 and self._config.rewards_confidence
        advice = low_entropy(vitals["surprisal"]) if vitals and first else None
        if advice and not self.verdicts:
            self.verdicts.append({"version": 0, "action": "warn", "found": "warn", "reasons": [advice]})
            logger.warning("before training: %s", advice)
        back = self.rolled_back
        if self._config.guard == "off" or vitals is None or (back and not back.get("share")):
            return "go_on"
        seen = Vitals.from_json(vitals | self._training_vitals.get(str(version), {}))
        verdict = self.guard.observe(version, seen, back["to"] if back else None)
        action = "warn" if self._config.guard == "warn" and verdict.action == "stop" else verdict.action
        if action != "go_on" and all(one["version"] != version for one in self.verdicts):
            found = {"version": version, "action": action, "found": verdict.action, "reasons": list(verdict.reasons)}
            self.verdicts.append(found)
            text = f"guard: {action} at version {version}: {'; '.join(verdict.reasons)}"
            self.news.append({"event": "guard", "text": text})
            logger.warning("%s", text)
        if action == "stop" and self._config.guard == "stop":
            good = self.guard.last_good
            raise GuardError(
                f"version {version} shows signs of collapse ({'; '.join(verdict.reasons)}), expected to stay near the"
                f" base model; the last good one is {f'version {good}: export it' if good else 'the base model'}; run"
                " again with a lower learner.learning_rate, fewer rounds, or guard=roll_back"
            )
        return action

    @property
    def ends_early(self) -> bool:
        """The run goes, or went, back to an earlier version: no round goes on."""
        stops = any(one["action"] == "stop" for one in self.verdicts)
        wanted = self.asked_back is not None or (stops and self._config.guard == "roll_back")
        return self.rolled_back is not None or wanted

    def way_back(self) -> Back:
        """The version to go back to: the one that was asked for; else the guard's last good one and a part of the step
        that was too much, or, where the guard has stopped at that too, nothing of it.
        """
        past = self.guard.first_bad
        if self.asked_back is not None or past is None:
            return Back(to=self.asked_back or 0, past=None, share=0.0)
        return Back(to=self.guard.last_good, past=past, share=0.0 if self.rolled_back else PART)

    def ask_back(self, version: int) -> None:
        """Somebody wants the run to end on the content of `version`. Raises InputError unless it is an older one."""
        older = [0, *(made for _, made in self.admission.made() if made < self.admission.newest)]
        if self.ends_early or version not in older or not self.admission.newest:
            raise InputError(
                f"run {self.run} cannot go back to version {version}: "
                + ("it is going back already" if self.ends_early else f"its newest is {self.admission.newest}")
                + f"; expected one of {older} while its rounds go on"
            )
        self.asked_back = version

    def roll_back(self, made: int) -> None:
        """What `way_back` says is version `made` now, the run's last unless the guard stops at it too."""
        back, current = self.way_back(), self.admission.rounds_ended
        newest = self.rolled_back["from"] if self.rolled_back else self.admission.newest
        abandoned = [round for round, version in self.admission.made() if version > back.newest]
        self.ledger.rolled_back(min(abandoned, default=current))
        self.rolled_back = {"from": newest, **asdict(back), "version": made}
        self._end(current, made)
        for round in range(current + 1, self._config.rounds):
            self._end(round, None)

    def had_no_pairs(self, round: int) -> None:
        """Every prompt of `round` was filtered or failed."""
        self._end(round, None)

    def _end(self, round: int, version: int | None) -> None:
        self.admission.end_round(round, version)
        self._ended.append([round, version])

    @property
    def seconds_of_this_life(self) -> float:
        """Run time since the start or the resume."""
        return self._clock() - self._started

    @property
    def seconds(self) -> float:
        """Run time so far, over all lives of the run."""
        return self._seconds_before + self.seconds_of_this_life

    def recovered(self, round: int, outcomes: Sequence[Outcome]) -> None:
        """Prompts of a round that were scored before a crash, or by a scorer that died before it could say so."""
        news = self.ledger.recovered(round, {outcome.sequence: outcome.reason for outcome in outcomes})
        self._count(round, [outcome for outcome in outcomes if outcome.sequence in news])

    def _seconds_left(self, scored: float) -> float | None:
        """From the share of prompts that are `scored` and the share of optimiser steps done, half and half.

        How many steps there will be is guessed from the examples so far.
        """
        if self.state == "done":
            return None
        config, examples = self._config, self.counts[self._examples(self.round)]
        passes = config.epochs(self.round) / config.examples_per_step(self.round)  # steps of an example
        expected = examples / scored * passes if scored else 0.0
        if not expected:
            return None
        share = (scored + min(1.0, self.counts["steps"] / expected)) / 2
        return self.seconds * (1.0 / share - 1.0)

    def room(self, first: int) -> int:
        """How many prompts the rounds from `first` on take."""
        return (self._config.rounds - first) * self.prompts_per_round

    @property
    def examples(self) -> int:
        """Pairs and credited traces so far."""
        return int(self.counts.get("pairs", 0) + self.counts.get("credited traces", 0))

    @property
    def staleness(self) -> int:
        """How many versions the generator that is furthest behind lacks."""
        held = [int(swap["version"]) for swap in self.swaps.values()]
        return self.admission.newest - min(held, default=self.admission.newest)

    def shares(self) -> Json:
        """{"share_parsed", "share_cut_off"} of the traces so far; None before the first."""
        traces = self.counts["traces"]
        return {f"share_{name}": self.counts[name] / traces if traces else None for name in ("parsed", "cut_off")}

    def measured(self) -> Json:
        """What a finished run's summary takes from here."""
        return {
            "accounting": self.ledger.totals(),
            "seconds": self.seconds,
            "peak_memory_gb": self.peak_memory_gb,
            "training": self.counts | self.shares(),
            "guard": {
                "verdicts": self.verdicts,
                "rolled_back": self.rolled_back,
                "training_vitals": self._training_vitals,
            },
        }

    def stopped(self, error: RlsfError) -> None:
        """`error` has ended the run, or this life of it."""
        self.state = "drained" if isinstance(error, DrainedError) else "failed"
        self.message = str(error)
        if self.state == "failed":
            self.error = {"type": type(error).__name__, "text": str(error)}

    @property
    def last_words(self) -> str:
        """How the run has ended, in a line."""
        return f"{self.state} at version {self.admission.newest}" + (f": {self.message}" if self.message else "")

    def nothing_trained(self) -> RlsfError:
        """Why no round has made a version: every prompt was filtered, or every batch has failed."""
        totals = self.ledger.totals()
        counts = ", ".join(f"{reason}: {count}" for reason, count in totals["reasons"].items()) or "no prompts"
        if totals["failed"] and not totals["filtered"]:
            return ServiceError(
                f"every batch failed, {totals['failed']} of {totals['admitted']} prompts ({counts}); expected pairs"
                " from at least one; look at the logs of the generators and scorers, then run under another --run name"
            )
        if self._config.advantages and (totals["trained"] or not self._config.reward_model):
            return NoPairsError(
                f"no prompt gave traces with different scores ({counts}); expected at least one in the run. Raise"
                " rollout.traces, raise rollout.max_tokens if traces were cut off, or choose another signal"
            )
        return NoPairsError(
            f"no prompt gave a preference pair ({counts}); expected at least one in the run."
            " Raise rollout.temperature or rollout.traces so that answers differ, raise rollout.max_tokens if traces"
            " were cut off, or lower pairs.min_chosen and pairs.min_gap"
        )

    def to_json(self) -> Json:
        return {
            "state": self.state,
            "error": self.error,
            "ended": [list(entry) for entry in self._ended],  # copies: a thread writes this while the run goes on
            "version": self.admission.newest,
            "ledger": self.ledger.to_json(),
            "counts": dict(self.counts),
            "guard": self.guard.to_json(),
            "training_vitals": dict(self._training_vitals),
            "verdicts": list(self.verdicts),
            "asked_back": self.asked_back,
            "rolled_back": self.rolled_back,
            "seconds": self.seconds,
            "peak_memory_gb": self.peak_memory_gb,
        }

    def status(self) -> Json:
        """What a progress display shows."""
        config, accounting = self._config, self.ledger.totals()
        total = config.rounds * self.prompts_per_round
        done = accounting["admitted"] - accounting["in_flight"]
        waiting = sum(len(self.ledger.sequences(round, PAIRS)) for round in range(config.rounds))
        elapsed = self.seconds_of_this_life
        return {
            "run": self.run,
            "state": self.state,
            "round": min(self.round, config.rounds - 1),
            "rounds": config.rounds,
            "version": self.admission.newest,
            "prompts_done": done + waiting,  # written and scored
            "prompts_total": total,
            "traces": self.counts["traces"],
            "tokens": self.counts["tokens"],
            "traces_per_s": (self.counts["traces"] - self._traces_before) / elapsed if elapsed > 0 else 0.0,
            **{name: self.counts[name] for name in ("pairs", "credited traces") if name in self.counts},
            "steps": self.counts["steps"],
            **self.shares(),
            "eta_s": self._seconds_left((done + waiting) / total),
            "accounting": accounting,
            "swaps": self.swaps,
            "verdicts": self.verdicts,
            "disk_used": self._disk_used,
            "message": self.message,
        }
