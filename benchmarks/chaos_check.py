"""What chaos.py counts: the accounting while kills go on; at the end each prompt and each trained pair, by ids."""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from rlsf_ray.config import RunConfig
from rlsf_ray.records import Json
from rlsf_ray.run_store import TRAINED_FILE, RunStore
from rlsf_ray.stream.ledger import FAILED, FILTERED, IN_FLIGHT, PAIRS, TRAINED, Ledger

LARGEST_DIFFERENCE = 1e-6  # of two adapters that are the same
SAMPLE_S = 1.0
MOST = 5  # examples of a fault that are printed

Place = tuple[int, int]  # (round, sequence) of a prompt
Books = Mapping[str, Sequence[Sequence[str]]]  # a ledger as state.json has it


class Accounts:
    """The accounting, sampled while kills go on: as `rlsf status` says it, and as a crash would leave it on disk."""

    def __init__(self, root: Path, config: RunConfig) -> None:
        self._root, self._config = root, config
        self._books: Books = {}
        self._looked, self._agreed = 0.0, set[int]()
        self.samples, self.violations = {"status": 0, "disk": 0}, list[str]()

    def status(self, found: Json) -> None:
        """One answer of the coordinator; before its run has begun it has no accounting."""
        if "accounting" in found:
            self.samples["status"] += 1
            self.violations += unequal(found["accounting"], self._config)

    def disk(self) -> None:
        """What state.json says now, once a second at most."""
        file = self._root / "state.json"
        if time.monotonic() - self._looked >= SAMPLE_S and file.exists():
            self._looked = time.monotonic()
            saved = json.loads(file.read_text())
            self.books(saved["ledger"])
            for round, version in saved["ended"]:
                if version and version not in self._agreed:
                    self._agree(version, sum(state == TRAINED for state, _ in saved["ledger"][str(round)]))

    def _agree(self, version: int, booked: int) -> None:
        """Are the prompts that the ledger calls trained as many as those that the version says it was trained on?"""
        file = self._root / f"versions/{version:04d}/{TRAINED_FILE}"
        if not file.exists():
            self.violations.append(f"round over, but nothing kept of version {version}")
            return
        groups = {pair.partition(" > ")[0].rpartition("/")[0] for pair in json.loads(file.read_text())["times"]}
        if len(groups) != booked:
            self.violations.append(f"{booked} prompts booked as trained, version {version} has {len(groups)}")
        self._agreed.add(version)

    def books(self, books: Books) -> None:
        """One ledger. What has ended in the one before has ended so for good."""
        self.samples["disk"] += 1
        self.violations += unequal(Ledger.from_json(books).totals(), self._config)
        now = _entries(books)
        for place, entry in _entries(self._books).items():
            if entry[0] not in (IN_FLIGHT, PAIRS) and now.get(place) != entry:
                self.violations.append(f"prompt {place} had ended as {entry}, and later was {now.get(place)}")
        self._books = books


def unequal(accounting: Json, config: RunConfig) -> list[str]:
    """What is wrong with one accounting: admitted = trained + filtered + failed + in flight, in whole rounds."""
    parts = {name: accounting[name] for name in (TRAINED, FILTERED, FAILED, IN_FLIGHT)}
    admitted, size = accounting["admitted"], config.prompts_per_round
    if admitted == sum(parts.values()) and admitted % size == 0 and admitted <= config.rounds * size:
        return []
    return [f"{admitted} admitted in rounds of {size}, but {parts}"]


def lineage(store: RunStore) -> tuple[Counter[str], list[str]]:
    """(pair -> how often the steps behind the last adapter have trained it, where the chain of versions breaks).

    Each version names the weights that it was trained from; they must be those of the version before.
    """
    times, breaks = Counter[str](), list[str]()
    for before, version in pairwise([0, *store.versions()]):
        found = store.read_json(f"versions/{version:04d}/{TRAINED_FILE}")
        if found is None:
            breaks.append(f"nothing says what version {version} was trained on")
            continue
        times.update(found["times"])
        if before and found["from"] != store.read_adapter(before)[1].checksum:
            breaks.append(f"version {version} was not trained from version {before}")
    return times, breaks


def check(store: RunStore, calm: RunStore) -> Json:
    """The finished run beside an undisturbed one of the same config, by ids; `faults` says what of it is wrong."""
    books, expected_books = (_entries(one.read_json("state.json")["ledger"]) for one in (store, calm))
    pairs, expected_pairs = (one.read_table("pairs").to_pylist() for one in (store, calm))
    times, breaks = lineage(store)
    expected_times = Counter({_pair_id(row): calm.config.epochs(row["round"]) for row in expected_pairs})
    places = {row["group_id"]: (row["round"], row["sequence"]) for row in _traces(calm)}
    ends = _ends(books, {places[row["group_id"]] for row in expected_pairs if times[_pair_id(row)]})
    prompts = [(round, at) for round in range(calm.config.rounds) for at in range(calm.config.prompts_per_round)]
    return {
        "prompts": len(prompts),
        "pairs": len(expected_times),
        "times": times.total(),
        "lost_prompts": [place for place in prompts if ends[place] < 1],
        "doubled_prompts": [place for place in ends if ends[place] > 1],
        "lost_pairs": list((expected_times - times).elements()),
        "doubled_pairs": list((times - expected_times).elements()),
        "breaks": breaks,
        "accounting": store.read_json("summary.json")["accounting"],
        "ends_equal": books == expected_books,
        "pairs_equal": pairs == expected_pairs,
        "traces_equal": _traces(store) == _traces(calm),
        "versions": len(store.versions()),
        "versions_equal": store.versions() == calm.versions(),
        "largest_difference_of_last_adapter": _difference(store, calm),
    }


def faults(result: Json, config: RunConfig) -> list[str]:
    """All that must not be, one line each; none: the run has come through. Decides the exit code."""
    found, accounts = result["check"], result["accounts"]
    named = ("lost_prompts", "doubled_prompts", "lost_pairs", "doubled_pairs", "breaks")
    lines = [f"{len(found[name])} {name}: {found[name][:MOST]}" for name in named if found[name]]
    lines += [f"{name} not: see the undisturbed run" for name in found if name.endswith("_equal") and not found[name]]
    if unequal(found["accounting"], config) or found["accounting"]["in_flight"]:
        lines.append(f"the accounting at the end does not close: {found['accounting']}")
    if not found["largest_difference_of_last_adapter"] <= LARGEST_DIFFERENCE:  # nan counts
        lines.append(f"the last adapter differs by {found['largest_difference_of_last_adapter']:.1g}")
    if accounts["violations"]:
        lines.append(f"{len(accounts['violations'])} samples of the accounting: {accounts['violations'][:MOST]}")
    if not all(accounts["samples"].values()):
        lines.append(f"the accounting was not sampled: {accounts['samples']}")
    counted = sum(kill["back_s"] is not None for kill in result["kills"])
    if counted < result["wanted"]:
        lines.append(f"only {counted} of {result['wanted']} kills count: the run was over before; raise --rounds")
    return lines


def table(result: Json) -> str:
    """The kills by role, and what came of them, as Markdown."""
    counted = [kill for kill in result["kills"] if kill["back_s"] is not None]
    lines = [
        "| role | kills | recovered in the same life | by a new life | median s | longest s |",
        "|---|---|---|---|---|---|",
    ]
    for role in sorted({kill["role"] for kill in counted}):
        kills = [kill for kill in counted if kill["role"] == role]
        new, times = sum(kill["new_life"] for kill in kills), [kill["back_s"] for kill in kills]
        row = (role, len(kills), len(kills) - new, new, f"{statistics.median(times):.1f}", f"{max(times):.1f}")
        lines.append(f"| {' | '.join(map(str, row))} |")
    found, accounts = result["check"], result["accounts"]
    return "\n".join(
        [
            *lines,
            "",
            f"{len(counted)} kills ({len(result['kills']) - len(counted)} more left out: the run was over first); they"
            f" fell {spread(counted)}. {len(result['errors'])} lives ended with an error.",
            f"{found['prompts']} prompts: lost {len(found['lost_prompts'])}, doubled {len(found['doubled_prompts'])}."
            f" {found['pairs']} pairs, trained {found['times']} times: lost {len(found['lost_pairs'])}, doubled"
            f" {len(found['doubled_pairs'])}.",
            f"Accounting: {accounts['samples']['status']} samples of the status and {accounts['samples']['disk']} of"
            f" the disk, {len(accounts['violations'])} violations. {found['versions']} versions, the last adapter"
            f" within {found['largest_difference_of_last_adapter']:.1g} of an undisturbed run's.",
        ]
    )


def spread(kills: Sequence[Json]) -> str:
    """Where in the run the kills fell."""
    if not kills:
        return "nowhere"
    rounds, steps = [kill["round"] for kill in kills], [kill["step"] for kill in kills]
    stages = ", ".join(f"{count} while {stage}" for stage, count in Counter(k["stage"] for k in kills).most_common())
    return (
        f"into {len(set(rounds))} rounds from {min(rounds) + 1} to {max(rounds) + 1}, after step {min(steps)} to"
        f" {max(steps)}: {stages}"
    )


def _entries(books: Books) -> dict[Place, tuple[str, str]]:
    return {(int(round), at): (e[0], e[1]) for round, entries in books.items() for at, e in enumerate(entries)}


def _ends(books: Mapping[Place, tuple[str, str]], trained: set[Place]) -> Counter[Place]:
    """How many ends each prompt has: the ledger's word counts for all but training, which the adapters show."""
    elsewhere = {place for place, (state, _) in books.items() if state not in (IN_FLIGHT, PAIRS, TRAINED)}
    return Counter([*elsewhere, *trained])


def _pair_id(row: Json) -> str:
    """As `TrainingGroup.example_ids` has it."""
    return f"{row['chosen_trace_id']} > {row['rejected_trace_id']}"


def _traces(store: RunStore) -> list[Json]:
    columns = ["round", "sequence", "group_id", "trace_id", "version", "text", "reason"]
    rows: list[Json] = store.read_table("traces").select(columns).to_pylist()
    return rows


def _difference(store: RunStore, calm: RunStore) -> float:
    """Between the last adapters, in any of their numbers; inf where they have not the same arrays."""
    found, wanted = (one.read_adapter(one.versions()[-1])[0] for one in (store, calm))
    if {name: array.shape for name, array in found.items()} != {name: a.shape for name, a in wanted.items()}:
        return float("inf")
    differences: list[Any] = [np.abs(found[name] - wanted[name]).max() for name in wanted]
    return float(np.max(differences))
