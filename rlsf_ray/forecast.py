"""What a run will take and make, told from one that has ended on machines of the same kind: no torch, no Ray.

Taken over from that run: the length of a trace, the examples of a prompt, the seconds that one actor needs for its
work, and what no stage explains (starting, publishing). Reckoned anew: how much work there is, and who shares it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlsf_ray.config import RunConfig
from rlsf_ray.config_sections import SEVERAL_TURNS
from rlsf_ray.errors import InputError
from rlsf_ray.placement import gpu_shares, placed
from rlsf_ray.plan import Plan, pools
from rlsf_ray.records import Json
from rlsf_ray.rollouts.programs import CALIBRATION_TRACES
from rlsf_ray.run_store import RunStore
from rlsf_ray.timeline import make_timeline
from rlsf_ray.wording import duration

ROLES = {"generate": "generator", "score": "scorer", "train": "trainer", "probe": "generator"}  # by stage
NAMES = {"generate": "generating", "score": "scoring", "train": "training", "probe": "measuring"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a finished run says of others. Seconds are of one actor."""

    run: str
    tokens_per_trace: float
    examples_per_prompt: float  # pairs or credited traces
    read_per_token: float  # tokens that one pass of training reads, for each that was written
    seconds_per_token: Mapping[str, float]  # by stage: written, scored, read, written to measure
    start_s: float  # before the first and after the last work
    gap_s: float  # in each round, in which nobody worked


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Expected amounts of a whole run."""

    tokens: Mapping[str, float]  # by stage, as in Rates.seconds_per_token
    examples: float
    device_s: Mapping[str, float]  # by stage, summed over its actors
    seconds: Mapping[str, float]  # by stage, its actors at work together and all others away
    total_s: float


def rates_of(store: RunStore, config: RunConfig, there: Mapping[str, float]) -> Rates:
    """What the run in `store` says of runs by `config`, both on a cluster of resources like `there`.

    Raises InputError if it has not ended, was not timed (the loop without Ray times nothing), or ran with another
    model, engine or rollout.
    """
    summary, like = store.read_json("summary.json"), _placed(store.config, there)
    stages = [row for row in store.read_metrics("stages") if row["stage"] in ROLES]
    tokens = {stage: sum(r["tokens"] for r in stages if r["stage"] == stage) for stage in ROLES}
    if summary is None or not tokens["generate"] or not tokens["train"]:
        raise InputError(f"{store.root} cannot say how long a run takes: expected a finished run of `rlsf run`")
    _check_alike(store, config)
    line, written, busy = make_timeline(stages), summary["training"]["tokens"], busy_seconds(stages)
    rounds = len({row["round"] for row in stages if row["stage"] == "generate"})
    worked = _together(like, busy | {s: busy[s] / _sharers(like, s) for s in busy if s != "train"})
    busy["train"] *= like.cluster.trainers.count  # one worker tells the time of all, who shared the tokens
    per_token = {stage: busy[stage] / tokens[stage] for stage in ROLES if tokens[stage]}
    learnt = sum(summary["training"].get(kind, 0) for kind in ("pairs", "credited traces"))
    return Rates(
        run=store.root,
        tokens_per_trace=written / summary["training"]["traces"],
        examples_per_prompt=learnt / summary["accounting"]["admitted"],
        read_per_token=tokens["train"] / _passes(like) / written,
        seconds_per_token={"probe": per_token["generate"], "score": 0.0, **per_token},
        start_s=max(0.0, summary["seconds"]["total"] - line.length_s),
        gap_s=max(0.0, (line.length_s - worked) / rounds),
    )


def forecast(plan: Plan, rates: Rates, there: Mapping[str, float]) -> Forecast:
    """What the planned run will take on a cluster with the resources `there`, of the kind `rates` was measured on."""
    config = _placed(plan.config, there)
    length = min(rates.tokens_per_trace, config.rollout.max_tokens * config.rollout.most_turns)
    written, measured = plan.traces * length, _measured_traces(plan) * length
    read = written * rates.read_per_token * _passes(config)
    tokens = {"generate": written, "score": written, "train": read, "probe": measured}
    device_s = {stage: amount * rates.seconds_per_token[stage] for stage, amount in tokens.items()}
    seconds = {stage: spent / _sharers(config, stage) for stage, spent in device_s.items()}
    return Forecast(
        tokens=tokens,
        examples=plan.prompts * rates.examples_per_prompt,
        device_s=device_s,
        seconds=seconds,
        total_s=rates.start_s + rates.gap_s * config.rounds + _together(config, seconds),
    )


def describe_forecast(plan: Plan, rates: Rates, there: Mapping[str, float]) -> str:
    """The forecast for a terminal, in lines that go on where the plan's end."""
    found, config = forecast(plan, rates, there), _placed(plan.config, there)
    tokens, by_stage = found.tokens, ", ".join(f"{NAMES[stage]} {duration(s)}" for stage, s in found.seconds.items())
    apart, how = ("on machines of their own ", "in turns") if _in_turns(config) else ("", "side by side")
    ratio = (found.device_s["generate"] + found.device_s["probe"]) / max(found.device_s["train"], 1e-9)
    return "\n".join(
        [
            f"Tokens   about {tokens['generate']:,.0f} written, {tokens['train']:,.0f} read in training,"
            f" {tokens['probe']:,.0f} written to measure",
            f"Learns   from about {found.examples:,.0f} {'credited traces' if config.advantages else 'pairs'}",
            f"Time     about {duration(found.total_s)}: {by_stage}, {how}",
            f"Balance  {apart}about {ratio:.2g} generators keep one training worker busy",
            f"Rates    of {rates.run}, on machines like those it ran on; the base model measured anew",
        ]
    )


def busy_seconds(stages: Sequence[Json]) -> dict[str, float]:
    """Seconds of work by stage, over all actors. What one actor does at the same time (vLLM) counts once."""
    of = {stage: make_timeline([row for row in stages if row["stage"] == stage]) for stage in ROLES}
    return {stage: sum(lane.busy_s for lane in line.lanes) for stage, line in of.items()}


def _check_alike(store: RunStore, config: RunConfig) -> None:
    like = store.config
    for key, its, ours in (
        ("model.name", like.model.name, config.model.name),
        ("engine", like.engine, config.engine),
        ("rollout.name", like.rollout.name, config.rollout.name),
    ):
        if its != ours:
            raise InputError(
                f"{store.root} ran with {key}={its}, expected {ours}: its rates say nothing of the other; name a run"
                " with the same, or make a short one (--set rounds=1 --set prompts_per_round=16)"
            )


def _placed(config: RunConfig, there: Mapping[str, float]) -> RunConfig:
    return placed(config, gpu_shares(config, there.get("GPU", 0.0)))


def _in_turns(config: RunConfig) -> bool:
    """Do the actors take turns on the cores of one machine (actors/cores.py)?"""
    return not any(pool.gpus or pool.threads for pool in pools(config).values())


def _sharers(config: RunConfig, stage: str) -> int:
    """How many actors do a stage's work at once. Those that take turns are no faster for being more; training workers
    take none among each other.
    """
    return 1 if _in_turns(config) and stage != "train" else pools(config)[ROLES[stage]].count


def _together(config: RunConfig, seconds: Mapping[str, float]) -> float:
    """Seconds of all stages, each of which takes so long alone: in turns their sum; else what one bounds goes on beside
    it. With `max_staleness: 0` no round's generation runs beside training.
    """
    if _in_turns(config):
        return sum(seconds.values())
    writing = max(seconds["generate"], seconds["score"]) + seconds["probe"]
    return max(writing, seconds["train"]) if config.cluster.max_staleness else writing + seconds["train"]


def _passes(config: RunConfig) -> float:
    """Passes of training over a round's groups, on average."""
    return sum(config.epochs(round) for round in range(config.rounds)) / config.rounds


def _measured_traces(plan: Plan) -> int:
    """Traces written to measure: the base model and the last version on every question, others on `eval.during`."""
    config, questions = plan.config, plan.probe_prompts
    between = (config.rounds - 1) * min(config.eval.during, questions)
    of_each = config.eval.samples * (2 if config.rollout.name in SEVERAL_TURNS else 1) + 1 + config.eval.branches
    return (2 * questions + between) * of_each + (config.rounds + 1) * plan.calibration_prompts * CALIBRATION_TRACES
