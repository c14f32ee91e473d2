"""RLSF in one process, without Ray: the file to read first.

    prompts -> K traces each -> scores from the model's own confidence -> pairs -> DPO steps -> new version -> again

The distributed service (actors/) calls the same stage functions; with `max_staleness: 0` and one generator it gives the
same pairs and the same adapter as this loop. Left out here and found there: overlap of the stages, several workers,
bounded buffers, faults. What this file keeps: the method, evaluation before and after, resume by round.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rlsf_ray.config import RunConfig
from rlsf_ray.engines.learner import Learner, pass_order, training_steps
from rlsf_ray.engines.scorer import Scorer, outcome
from rlsf_ray.engines.transformers_engine import TransformersEngine
from rlsf_ray.errors import InputError, NoPairsError
from rlsf_ray.evaluate import cached_base, evaluate_version, run_summary, store_base
from rlsf_ray.records import Json, ProbePrompt, Prompt, StepReport, TrainingGroup
from rlsf_ray.rollouts.programs import write_groups
from rlsf_ray.run_store import RunStore
from rlsf_ray.tasks.sources import load_sets, prompts_of_round

OnStatus = Callable[[Json], None]


@dataclass
class Progress:
    """What has happened so far; `status` is what a progress display shows."""

    config: RunConfig
    run: str
    on_status: OnStatus
    state: str = "starting"
    version: int = 0
    round: int = 0
    admitted: int = 0
    trained: int = 0
    traces: int = 0
    pairs: int = 0
    steps: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    started: float = field(default_factory=time.time)

    def accounting(self) -> Json:
        filtered = sum(self.reasons.values())
        return {
            "admitted": self.admitted,
            "trained": self.trained,
            "filtered": filtered,
            "failed": 0,
            "in_flight": self.admitted - self.trained - filtered,
            "reasons": dict(self.reasons),
        }

    def tell(self, state: str) -> None:
        self.state = state
        config, seconds = self.config, time.time() - self.started
        total = config.rounds * config.prompts_per_round
        share = self.trained / total if total else 0.0
        self.on_status(
            {
                "run": self.run,
                "state": state,
                "round": self.round,
                "rounds": config.rounds,
                "version": self.version,
                "prompts_done": self.admitted,
                "prompts_total": total,
                "traces": self.traces,
                "traces_per_s": self.traces / seconds if seconds else 0.0,
                "pairs": self.pairs,
                "steps": self.steps,
                "eta_s": seconds / share - seconds if share else None,
                "accounting": self.accounting(),
                "message": "",
            }
        )


def run(config: RunConfig, root: str, on_status: OnStatus = lambda status: None) -> Json:
    """Run every round of `config` in the run directory `root` (a folder or fsspec URL); returns the summary.

    Calling it again with the same config goes on after the last finished round.
    Raises InputError for a bad config or another run in `root`, NoPairsError if no prompt gave a pair.
    """
    store = RunStore.create_or_resume(root, config)
    train, probe = load_sets(config)
    progress = Progress(config, store.root, on_status)
    engine = TransformersEngine(config.model, config.learner)
    scorer, learner = Scorer(config), Learner(config)
    first_round = _resume(store, engine, learner, progress)
    evaluate(store, engine, probe, progress)
    for round in range(first_round, config.rounds):
        progress.round = round
        prompts = prompts_of_round(train, round, config.prompts_per_round, config.seed)
        groups = generate_and_score(engine, scorer, prompts, store, progress)
        if not groups:
            continue  # nothing to learn: this round publishes no version
        train_round(learner, groups, store, progress)
        publish(store, engine, learner, progress)
        if round + 1 < config.rounds:
            evaluate(store, engine, probe[: config.eval.during], progress)
    scorer.close()
    if progress.version == 0:
        raise no_pairs_error(progress.reasons)
    evaluate(store, engine, probe, progress)
    progress.tell("done")
    return run_summary(store, accounting=progress.accounting(), seconds=time.time() - progress.started)


def evaluate(store: RunStore, engine: TransformersEngine, probe: Sequence[ProbePrompt], progress: Progress) -> None:
    """Measure the newest version on `probe`, unless that is known. The base model's measure is shared between runs."""
    config, version = progress.config, progress.version
    path = f"eval/version-{version:04d}.json"
    known = store.read_json(path)
    if not probe or (known is not None and known["num_questions"] >= len(probe)):
        return
    progress.tell(f"evaluating version {version}")
    evaluation = cached_base(config, probe) if version == 0 else None
    if evaluation is None:
        evaluation = evaluate_version(engine, probe, config, version)
        if version == 0:
            store_base(config, probe, evaluation)
    store.write_json(path, evaluation)


def generate_and_score(
    engine: TransformersEngine, scorer: Scorer, prompts: Sequence[Prompt], store: RunStore, progress: Progress
) -> list[TrainingGroup]:
    """One round of prompts, in batches of `prompts_per_call`: traces, scores, pairs, reference log-probs."""
    config, groups = progress.config, list[TrainingGroup]()
    size = config.cluster.prompts_per_call
    for part, start in enumerate(range(0, len(prompts), size)):
        progress.tell("generating")
        written = write_groups(
            engine,
            prompts[start : start + size],
            config=config,
            round=progress.round,
            first_sequence=start,
            version=progress.version,
        )
        scored = scorer.score(written)
        training = scorer.training_groups(scored)
        store.write_table("traces", progress.round, part, [row for one in scored for row in store.trace_rows(one)])
        store.write_table("pairs", progress.round, part, [row for one in training for row in store.pair_rows(one)])
        progress.admitted += len(written)
        for end in map(outcome, scored):
            progress.traces += end.num_traces
            progress.pairs += end.num_pairs
            progress.reasons.update([end.reason] if end.reason else [])
        groups += training
    return groups


def train_round(learner: Learner, groups: Sequence[TrainingGroup], store: RunStore, progress: Progress) -> None:
    """`epochs` passes over the round's groups: the first in admission order, the others shuffled."""
    settings = progress.config.learner
    for pass_index in range(settings.epochs):
        order = pass_order(groups, progress.config.seed, progress.round, pass_index)
        for step in training_steps(order, settings.pairs_per_step):
            total = sum(len(group.pairs) for group in step)
            report = learner.train_step(step, total_pairs=total, round=progress.round, pass_index=pass_index)
            store.append_metrics("train", [step_row(report)])
            progress.steps += 1
            progress.tell("training")
    progress.trained += len(groups)


def publish(store: RunStore, engine: TransformersEngine, learner: Learner, progress: Progress) -> None:
    """The adapter becomes the next version: checkpointed, written to the run directory, loaded by the engine."""
    version, adapter = progress.round + 1, learner.adapter()
    store.storage.write(f"checkpoints/loop/round-{progress.round:04d}.safetensors", learner.state_bytes())
    store.write_adapter(version, adapter, progress.config.model.name, progress.config)
    engine.load_version(version, adapter)
    progress.version = version
    done = {"round": progress.round, "version": version, "steps": progress.steps, "accounting": progress.accounting()}
    store.write_json("state.json", done | {"traces": progress.traces, "pairs": progress.pairs})


def _resume(store: RunStore, engine: TransformersEngine, learner: Learner, progress: Progress) -> int:
    """Go on after the last published round, if there is one; returns the first round to run."""
    state = store.read_json("state.json")
    if state is None:
        return 0
    if "ledger" in state:
        raise InputError(
            f"{store.root} holds a run of the service, expected one of this loop; go on with `rlsf run`, or give"
            " another folder"
        )
    learner.load_state_bytes(store.storage.read(f"checkpoints/loop/round-{state['round']:04d}.safetensors") or b"")
    adapter, _ = store.read_adapter(state["version"])
    engine.load_version(state["version"], adapter)
    accounting = state["accounting"]
    progress.version, progress.steps = state["version"], state["steps"]
    progress.admitted, progress.trained = accounting["admitted"], accounting["trained"]
    progress.traces, progress.pairs = state["traces"], state["pairs"]
    progress.reasons.update(accounting["reasons"])
    return int(state["round"]) + 1


def step_row(report: StepReport) -> Json:
    """One line of metrics/train.jsonl: means over the step's pairs."""
    row: Json = {"time": time.time(), "round": report.round, "step": report.step, "pass": report.pass_index}
    row |= {"num_pairs": report.num_pairs, **report.means()}
    return row | {"grad_norm": report.grad_norm, "learning_rate": report.learning_rate}


def no_pairs_error(reasons: Counter[str]) -> NoPairsError:
    """Says why every prompt was filtered, commonest reason first."""
    counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common()) or "no prompts"
    return NoPairsError(
        f"no prompt gave a preference pair ({counts}); expected at least one in the run."
        " Raise rollout.temperature or rollout.traces so that answers differ, raise rollout.max_tokens if traces were"
        " cut off, or lower pairs.min_chosen and pairs.min_gap"
    )
