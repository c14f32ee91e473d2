"""The guard: label-free signs of each version -> go on, warn, or stop.

A pure state machine. It never sees a gold answer: it compares how a version writes on the calibration prompts, which
are the same for every version, with how the base model and the versions before it wrote on them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rlsf_ray.records import Json

Action = Literal["go_on", "warn", "stop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Vitals:
    """How one version writes: means over the traces of the calibration prompts, without labels.

    `votes` holds the answer of each prompt whose vote is settled: others change with the draw.
    """

    agreement: float  # share of the other traces of a prompt with the same answer
    answer_prob: float  # the model's probability of its answer
    commonest: float  # share of prompts whose voted answer is the commonest of all prompts
    distinct: float  # different answers of a prompt
    surprisal: float  # -log p of a written token, in nats (drawn at temperature 1, its mean would be the entropy)
    length: float  # tokens
    repetition: float  # share of 4-grams that the trace has written before
    parsed: float  # share of traces with an answer
    votes: Mapping[str, str]
    kl: float = 0.0  # from the base model in nats a token, of the traces that the version was trained on
    logprob_gap: float = 0.0  # trainer against generators, in nats a token, when that training began
    prompts: int = 0  # how many were written for
    cut_off: float = 0.0  # share of traces that reached the token limit
    # Share of the pairs of ANSWERED traces of a prompt with the same answer, which learning the format does not move
    agreed: float = math.nan  # no prompt has two of them

    @classmethod
    def from_json(cls, found: Json) -> Vitals:
        """What `asdict` gave, after JSON, which has no nan."""
        filled: dict[str, Any] = {name: math.nan if value is None else value for name, value in found.items()}
        return cls(**filled)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What to do after a version, and why, with the numbers."""

    action: Action
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sign:
    """One thing to look at. It is crossed below `least` or above `most`, in numbers of the base's."""

    name: str
    least: float | None = None
    most: float | None = None
    relative: bool = False  # limits are multiples of the base model's value; else they are added to it
    action: Action = "stop"

    def crossed(self, value: float, base: float) -> str | None:
        """The reason with its numbers, None if all is well."""
        if not math.isfinite(value):
            return f"{self.name} is {value}, expected a finite number"
        for limit, word, sign in ((self.least, "at least", -1), (self.most, "at most", 1)):
            if limit is None:
                continue
            bound = base * limit if self.relative else base + limit
            if (value - bound) * sign > 0:
                return f"{self.name} is {value:.3g}, base model {base:.3g}, expected {word} {bound:.3g}"
        return None


# A healthy run makes a model surer, and shorter, or longer where it learns to reason: these limits leave room for that.
# Measured on both kinds of run: benchmarks/results/log.md, "Where the guard's limits come from".
SIGNS = (
    Sign("commonest", most=0.25),
    Sign("surprisal", least=0.05, most=1.75, relative=True),
    Sign("surprisal", least=0.25, relative=True, action="warn"),
    Sign("length", least=0.4, most=3.0, relative=True),
    Sign("repetition", most=0.15),
    Sign("parsed", least=-0.2),
    Sign("distinct", least=0.2, relative=True, action="warn"),
    Sign("cut_off", most=0.2, action="warn"),
    Sign("kl", most=0.5, action="warn"),
    Sign("logprob_gap", most=1.0, action="warn"),
)
FLIPS = 0.4  # share of settled votes that changed from one version to the next: at least half of these were wrong
LEAST_VOTES, MANY_VOTES = 8, 20  # settled for both versions: to speak of a share; to stop a run for it
UNANIMOUS = 0.4  # rise of the agreement of answered traces: the pairs of a run are too few to teach so many answers
SURER, TWICE = 0.15, 2.0  # answer probability that rises so much, and more than twice as much as agreement
LEAST_ENTROPY = 0.5  # nats a token, at which the models of RLIF 2506.17219 (section 5) gained nothing more
LEAST_PROMPTS = 20  # with fewer a sign may be chance: a warning at most


def low_entropy(surprisal: float) -> str | None:
    """Advice for a run that makes a model surer, from the base model's own entropy; None if there is room.

    Of texts drawn closer than at temperature 1 `surprisal` is below the entropy, and the advice comes early.
    """
    if surprisal >= LEAST_ENTROPY:
        return None
    return (
        f"the base model's entropy is {surprisal:.2f} nats a token; below about {LEAST_ENTROPY} rewards for being sure"
        " gained little and soon harmed (2506.17219): expect little, keep the rounds few, and watch the versions"
    )


class Guard:
    """Watches one run, from version 0 on. Observing a version again changes nothing."""

    def __init__(self, seen: Sequence[Json] = ()) -> None:
        self._seen: dict[int, Vitals] = {}
        self._since: dict[int, int] = {}
        self._verdicts: dict[int, Verdict] = {}
        for one in seen:
            self.observe(one["version"], Vitals.from_json(one["vitals"]), one.get("since"))

    def observe(self, version: int, vitals: Vitals, since: int | None = None) -> Verdict:
        """The verdict on this version. `since`: the version it comes from, None for the one before it."""
        if version in self._verdicts:
            return self._verdicts[version]
        before = [known for known in self._seen if known < version]
        found: list[tuple[Action, str]] = []
        if before:
            self._since[version] = max(before) if since is None else since
            found = self._signs(vitals, self._seen[min(before)], self._seen[self._since[version]])
        action: Action = "go_on"
        if found:
            stops = any(kind == "stop" for kind, _ in found) and vitals.prompts >= LEAST_PROMPTS
            action = "stop" if stops else "warn"
        self._seen[version] = vitals
        self._verdicts[version] = Verdict(action=action, reasons=tuple(text for _, text in found))
        return self._verdicts[version]

    @property
    def last_good(self) -> int:
        """The newest version before the first that gave a reason to stop."""
        bad = self.first_bad
        return max((version for version in self._verdicts if bad is None or version < bad), default=0)

    @property
    def first_bad(self) -> int | None:
        """The first version that gave a reason to stop."""
        return min((version for version, verdict in self._verdicts.items() if verdict.action == "stop"), default=None)

    def _signs(self, now: Vitals, base: Vitals, before: Vitals) -> list[tuple[Action, str]]:
        found: list[tuple[Action, str]] = []
        for sign in SIGNS:
            reason = sign.crossed(getattr(now, sign.name), getattr(base, sign.name))
            if reason and not any(reason == known for _, known in found):
                found.append((sign.action, reason))
        if now.agreed > base.agreed + UNANIMOUS:
            text = f"two answers to a prompt agree in {now.agreed:.0%}, the base model's in {base.agreed:.0%}"
            found.append(("stop", f"{text}, expected at most {base.agreed + UNANIMOUS:.0%}"))
        surer, agrees = now.answer_prob - base.answer_prob, now.agreement - base.agreement
        if surer > max(SURER, TWICE * agrees):
            found.append(("warn", f"answer_prob rose by {surer:.3g} while agreement moved by {agrees:+.3g}"))
        flips, both = flipped(before.votes, now.votes), len(before.votes.keys() & now.votes.keys())
        if flips > FLIPS:
            text = f"{flips:.0%} of {both} settled votes changed, expected at most {FLIPS:.0%}"
            found.append(("stop" if both >= MANY_VOTES else "warn", text))
        return found

    def to_json(self) -> list[Json]:
        """What `Guard(seen)` takes."""
        return [
            {"version": version, "since": self._since.get(version), "vitals": asdict(vitals)}
            for version, vitals in self._seen.items()
        ]


def flipped(before: Mapping[str, str], now: Mapping[str, str]) -> float:
    """Share of the prompts with a settled vote both times whose answer changed; 0 where there are too few."""
    both = before.keys() & now.keys()
    return sum(before[prompt] != now[prompt] for prompt in both) / len(both) if len(both) >= LEAST_VOTES else 0.0
