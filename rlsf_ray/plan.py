"""What a run will need and do, found without starting anything: no torch, no Ray."""

from __future__ import annotations

import ast
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from rlsf_ray.config import RunConfig
from rlsf_ray.config_loading import dump_config
from rlsf_ray.config_sections import PoolConfig
from rlsf_ray.engines.build import check_installed
from rlsf_ray.engines.models import most_tokens
from rlsf_ray.errors import InputError
from rlsf_ray.model_check import ModelFacts, check_lengths, check_model, elicit_length, prompt_lengths
from rlsf_ray.placement import gpu_shares, placed
from rlsf_ray.records import Prompt
from rlsf_ray.stream.guard import LEAST_PROMPTS
from rlsf_ray.tasks.sources import load_sets


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The result of checking a run's input. Counts of steps are the most there can be."""

    config: RunConfig
    model: ModelFacts | None  # None: not on this machine yet
    train_prompts: int  # distinct
    probe_prompts: int
    calibration_prompts: int
    longest_prompt: int | None  # tokens; None: not known before the model is here
    prompts: int  # over all rounds
    traces: int
    steps: int


def check_input(config: RunConfig) -> Plan:
    """Everything that can be found wrong before anything heavy starts.

    Raises InputError for a fault of the model folder, of the data, or of a function named by the config.
    """
    for key, name in _functions(config).items():
        _check_function(key, name)
    check_installed(config)
    train, probe, calibration = load_sets(config)
    model, lengths = check_prompts(config, [*train, *calibration, *(item.prompt for item in probe)])
    per_round = min(config.prompts_per_round, len(train))  # no prompt stands twice in a round
    num_prompts = config.rounds * per_round
    return Plan(
        config=config,
        model=model,
        train_prompts=len(train),
        probe_prompts=len(probe),
        calibration_prompts=len(calibration),
        longest_prompt=max(lengths) if lengths else None,
        prompts=num_prompts,
        traces=num_prompts * config.rollout.traces,
        steps=_most_steps(config, per_round),
    )


def check_prompts(config: RunConfig, prompts: Sequence[Prompt]) -> tuple[ModelFacts | None, list[int] | None]:
    """(what the model's folder says, the tokens of each prompt); None of what is not known before the model is here.

    Raises InputError for a fault of the folder, and for prompts that leave no room for a trace.
    """
    model = check_model(config.model)
    if model:
        model = replace(model, context=most_tokens(model.context, config.engine_args))
    lengths = prompt_lengths(model, prompts) if model else None
    if model and lengths:
        elicit = elicit_length(model) if config.data.answer == "elicit" else 0
        check_lengths(model, prompts, lengths, config.rollout, elicit)
    return model, lengths


def pools(config: RunConfig) -> dict[str, PoolConfig]:
    """The pools of actors by the role of their members."""
    cluster = config.cluster
    return {"generator": cluster.generators, "scorer": cluster.scorers, "trainer": cluster.trainers}


def needed_resources(config: RunConfig) -> dict[str, float]:
    """Ray's logical CPUs and GPUs, summed over the pools; the actors that only steer take none."""
    members = pools(config).values()
    return {
        "CPU": sum(pool.count * pool.cpus for pool in members),
        "GPU": sum(pool.count * (pool.gpus or 0.0) for pool in members),
    }


def missing_resources(config: RunConfig, available: Mapping[str, float]) -> list[str]:
    """One line for each resource of which `available` (as `ray.cluster_resources()` gives it) has too little."""
    keys = {"CPU": "cpus", "GPU": "gpus"}
    lines = []
    for name, needed in needed_resources(config).items():
        there = float(available.get(name, 0.0))
        if needed > there + 1e-6:
            share = " + ".join(
                f"{role} {pool.count} x {getattr(pool, keys[name]):g}"
                for role, pool in pools(config).items()
                if getattr(pool, keys[name])
            )
            lines.append(
                f"{needed:g} {name} needed ({share}), {there:g} there; add nodes, or lower"
                f" cluster.<pool>.count or cluster.<pool>.{keys[name]}"
            )
    return lines


def local_resources() -> dict[str, float]:
    """What an embedded Ray would find on this machine."""
    gpus = Path("/proc/driver/nvidia/gpus")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        num_gpus = len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    else:
        num_gpus = len(list(gpus.iterdir())) if gpus.is_dir() else 0
    return {"CPU": float(os.cpu_count() or 1), "GPU": float(num_gpus)}


def describe(plan: Plan, available: Mapping[str, float], where: str) -> str:
    """The plan as text for a terminal; `where` names the cluster whose resources `available` are.

    Raises InputError if the pools do not fit its GPUs by themselves.
    """
    config = placed(plan.config, gpu_shares(plan.config, available.get("GPU", 0.0)))
    needed = needed_resources(config)
    lines = [dump_config(plan.config).rstrip(), "", f"Model    {_describe_model(plan)}"]
    longest = "not known before the model is here" if plan.longest_prompt is None else f"{plan.longest_prompt} tokens"
    lines += [
        f"Prompts  {plan.train_prompts} to train, {plan.calibration_prompts} to calibrate, {plan.probe_prompts} to"
        f" probe; longest: {longest}",
        f"Work     {config.rounds} rounds x {plan.prompts // config.rounds} prompts x {config.rollout.traces} traces"
        f" = {plan.traces} traces; at most {plan.steps} optimiser steps",
        "Actors   " + "; ".join(_describe_pool(role, pool) for role, pool in pools(config).items()),
        f"Guard    {_describe_guard(plan)}",
        f"Needs    {needed['CPU']:g} CPU, {needed['GPU']:g} GPU",
        f"There    {available.get('CPU', 0):g} CPU, {available.get('GPU', 0):g} GPU ({where})",
    ]
    missing = missing_resources(config, available)
    return "\n".join([*lines, *(f"Missing  {line}" for line in missing)] if missing else [*lines, "Missing  nothing"])


def _describe_guard(plan: Plan) -> str:
    prompts, guard = plan.calibration_prompts, plan.config.guard
    if guard != "off" and not prompts:
        return f"{guard}, but blind: there are no calibration prompts (data.calibration)"
    if guard not in ("off", "warn") and prompts < LEAST_PROMPTS:
        return f"{guard}, but it only warns: {prompts} calibration prompts, expected {LEAST_PROMPTS} (data.calibration)"
    return guard


def _describe_model(plan: Plan) -> str:
    if plan.model is None:
        how = "converted" if plan.config.model.name == "smollm2" else "fetched from the hub"
        return f"{plan.config.model.name}: {how} at the first run"
    return f"{plan.model.folder} ({plan.model.architecture}, context {plan.model.context} tokens)"


def _describe_pool(role: str, pool: PoolConfig) -> str:
    gpu = f", {pool.gpus:g} GPU each" if pool.gpus else ""
    turns = "" if pool.gpus or pool.threads else ", takes turns on all cores of its node"
    return f"{pool.count} {role}{'s' if pool.count > 1 else ''} ({pool.cpus:g} CPU{gpu}{turns})"


def _most_steps(config: RunConfig, prompts_per_round: int) -> int:
    """Every prompt gives as many examples as the rule allows; the last step of a pass may be short."""
    all_pairs = config.rollout.traces * (config.rollout.traces - 1) // 2
    steps = 0
    for round in range(config.rounds):
        most = min(config.pairs.max_pairs or all_pairs, all_pairs) if config.has_pairs(round) else config.rollout.traces
        prompts = min(config.most_prompts(round, prompts_per_round) or prompts_per_round, prompts_per_round)
        steps += config.epochs(round) * math.ceil(prompts * most / config.examples_per_step(round))
    return steps


def _functions(config: RunConfig) -> dict[str, str]:
    learning = {"pairs.rule": config.pairs.rule} if config.has_pairs(0) else {}
    learning |= {"advantages.rule": config.advantages.rule} if config.advantages else {}
    return {"signal": config.signal, **learning, "rollout.name": config.rollout.name}


def _check_function(key: str, name: str) -> None:
    """The module of a user's own `package.module:function` can be found and defines the name (it is not run)."""
    if ":" not in name:
        return
    module, _, function = name.partition(":")
    try:
        found = find_spec(module)
    except ImportError:
        found = None
    if found is None:
        raise InputError(
            f"{key}={name}: no module called {module} can be found; install it, put its folder on PYTHONPATH,"
            " or correct the name"
        )
    names = _defined_names(found.origin) if found.origin and found.origin.endswith(".py") else None
    if names is not None and function not in names:
        near = get_close_matches(function, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "define it there, or correct the name"
        raise InputError(f"{key}={name}: {found.origin} defines no {function}; {hint}")


def _defined_names(path: str) -> set[str] | None:
    """What a module assigns, defines or imports at its top level; None where only running it could tell."""
    try:
        tree = ast.parse(Path(path).read_bytes(), path)
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{path} is not valid Python: {error}; correct it") from error
    names: set[str] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            continue  # what stands inside is not the module's
        if isinstance(node, ast.alias):
            names.add(node.asname or node.name.partition(".")[0])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        waiting += ast.iter_child_nodes(node)
    return None if names & {"*", "__getattr__"} else names
