"""RLSF in one process, without Ray: the file to read first.

    prompts -> K traces each -> scores from the model's own confidence -> pairs or advantages -> steps -> new version

The distributed service (actors/) calls the same stage functions; with `max_staleness: 0` and one generator it gives the
same pairs and the same adapter as this loop. Left out here and found there: overlap of the stages, several workers,
bounded buffers, faults. What this file keeps: the method, evaluation before and after, resume by round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass

from rlsf_ray.base_cache import cached_base, store_base
from rlsf_ray.config import RunConfig
from rlsf_ray.engines.base import Engine
from rlsf_ray.engines.build import build_engine
from rlsf_ray.engines.learner import Learner, steps_in
from rlsf_ray.engines.scorer import Scorer, outcome
from rlsf_ray.engines.steps import StepSize, pass_order, surest, training_steps
from rlsf_ray.errors import GuardError, InputError, NoPairsError, ServiceError, StorageError
from rlsf_ray.evaluate import evaluate_version, run_summary
from rlsf_ray.judging import of_batch
from rlsf_ray.placement import ONE_GPU, placed
from rlsf_ray.records import Json, Prompt, StepReport, TrainingGroup
from rlsf_ray.rollouts.programs import write_groups
from rlsf_ray.run_store import RunStore
from rlsf_ray.stream.guard import Action
from rlsf_ray.stream.run_state import RunState
from rlsf_ray.tasks.sources import PromptSets, load_sets, prompts_of_round
from rlsf_ray.vitals import training_vitals

OnStatus = Callable[[Json], None]


@dataclass
class Parts:
    """What a run works with."""

    config: RunConfig
    store: RunStore
    state: RunState
    sets: PromptSets
    engine: Engine
    scorer: Scorer
    learner: Learner
    on_status: OnStatus

    def tell(self, message: str) -> None:
        """Show where the run stands, and what it does now."""
        self.state.message = message
        self.on_status(self.state.status())

    def save(self) -> None:
        """Keep where the run stands: a resume begins here."""
        self.store.write_json("state.json", self.state.to_json() | {"by": "loop"})


def run(config: RunConfig, root: str, on_status: OnStatus = lambda status: None) -> Json:
    """Run every round of `config` in the run directory `root` (a folder or fsspec URL); returns the summary.

    Calling it again with the same config goes on after the last finished round.
    Raises InputError for a bad config or another run in `root`, NoPairsError if no prompt gave a pair, GuardError if
    the guard is to stop the run, StorageError if a file of the run is missing or damaged, or the disk is full.
    """
    store = RunStore.create_or_resume(root, config)
    with store.storage.lock():
        state = _state(store)
        summary: Json | None = store.read_json("summary.json")
        if summary is not None and state.state == "done":
            return summary
        parts = _build(store, state, on_status)
        state.prompts_per_round = len(round_prompts(parts, 0))
        with closing(parts.scorer), closing(parts.engine):
            try:
                all_rounds(parts)
            except (GuardError, NoPairsError, ServiceError) as error:
                state.stopped(error)
                parts.save()
                raise
        state.state = "done"
        parts.save()
        parts.tell("")
        return run_summary(store, **state.measured())


def all_rounds(parts: Parts) -> None:
    """The rounds that are left, then the last version's measure. Raises NoPairsError if none has made a version."""
    state, config = parts.state, parts.config
    while (round := state.admission.rounds_ended) < config.rounds:
        parts.store.storage.check_lock()
        # Of a version in between a few questions; the base is measured on all, like the last
        if evaluate(parts, config.eval.during if state.admission.newest else None) == "stop":
            roll_back(parts)
        else:
            one_round(parts, round, round_prompts(parts, round))
    if state.admission.newest == 0:
        raise state.nothing_trained()
    while evaluate(parts) == "stop":
        roll_back(parts)


def round_prompts(parts: Parts, round: int) -> list[Prompt]:
    """What a round trains on."""
    return prompts_of_round(parts.sets.train, round, parts.config.prompts_per_round, parts.config.seed)


def one_round(parts: Parts, round: int, prompts: Sequence[Prompt]) -> None:
    """From prompts to the next version. A round without pairs publishes none."""
    parts.state.round = round
    if parts.config.reward_model and round == parts.config.reward_model.rounds:
        _policy_begins(parts)
    scored = generate_and_score(parts, round, prompts)
    groups, left_out = surest(scored, parts.config.most_prompts(round, len(prompts)))
    if groups:
        reports = train_round(parts, round, groups)
        publish(parts, round, groups, reports[0].logprob_gap, {g.sequence: g.num_examples for g in left_out})
    else:
        parts.state.had_no_pairs(round)
        parts.save()


def evaluate(parts: Parts, questions: int | None = None) -> Action:
    """Measure the newest version on the first `questions` of the probe set (None: all), unless that is known.

    The base model's measure is shared between runs. Returns what the guard says of this version.
    """
    config, version, sets = parts.config, parts.state.admission.newest, parts.sets
    sets = sets._replace(probe=sets.probe[:questions])
    if not sets.probe and not sets.calibration:
        return "go_on"
    evaluation = parts.store.measured(version, len(sets.probe))
    if evaluation is None and version == 0:
        evaluation = cached_base(config, sets)
    if evaluation is None:
        parts.tell(f"evaluating version {version}")
        evaluation = evaluate_version(parts.engine, sets, config, version, parts.store.earlier_answers(version))
        if version == 0:
            store_base(config, sets, evaluation)
    parts.store.write_evaluation(evaluation)
    return parts.state.judged(version, evaluation["vitals"])


def roll_back(parts: Parts) -> None:
    """The last good version and a part of the step that was too much, or none of it, becomes a new version."""
    version = parts.state.admission.newest + 1
    parts.learner.set_adapter(parts.store.read_between(*astuple(parts.state.way_back())))
    parts.store.storage.write(_checkpoint(version - 1), parts.learner.state_bytes())
    parts.state.roll_back(version)
    parts.save()
    _deliver(parts)


def generate_and_score(parts: Parts, round: int, prompts: Sequence[Prompt]) -> list[TrainingGroup]:
    """One round of prompts, in batches of `prompts_per_call`: traces, scores, pairs, reference log-probs."""
    config, store, state, groups = parts.config, parts.store, parts.state, list[TrainingGroup]()
    size = config.cluster.prompts_per_call
    state.ledger.admit(round, len(prompts))
    for part, start in enumerate(range(0, len(prompts), size)):
        parts.tell("generating and scoring")
        written = write_groups(
            parts.engine,
            prompts[start : start + size],
            config=config,
            round=round,
            first_sequence=start,
            version=state.admission.newest,
        )
        scored = parts.scorer.score(written)
        training = parts.scorer.training_groups(scored)
        store.write_table("traces", round, part, [row for one in scored for row in store.trace_rows(one)])
        store.write_table("pairs", round, part, [row for one in training for row in store.pair_rows(one)])
        if found := of_batch(scored):
            store.append_metrics("judges", [{"round": round, "part": part, **found}])
        state.scored(round, [outcome(one) for one in scored])
        groups += training
    return groups


def train_round(parts: Parts, round: int, groups: Sequence[TrainingGroup]) -> list[StepReport]:
    """`epochs` passes over the round's groups: the first in admission order, the others shuffled."""
    config, newest, reports = parts.config, parts.state.admission.newest, list[StepReport]()
    for pass_index in range(config.epochs(round)):
        order = pass_order(groups, config.seed, round, pass_index)
        for step in training_steps(order, config.examples_per_step(round)):
            size = StepSize.of(step)
            report = parts.learner.train_step(step, size=size, round=round, pass_index=pass_index, newest=newest)
            reports.append(report)
            parts.store.append_metrics("train", [step_row(report)])
            parts.state.counts["steps"] += 1
            parts.tell("training")
    return reports


def publish(
    parts: Parts, round: int, groups: Sequence[TrainingGroup], logprob_gap: float, left_out: Mapping[int, int]
) -> None:
    """The adapter becomes the next version. Its checkpoint comes first: what `state.json` says can be resumed.

    A round of the reward model makes no version: the policy is still the base model.
    """
    of_reward = parts.config.trains_reward(round)
    parts.store.storage.write(_checkpoint(round), parts.learner.state_bytes())
    if of_reward:
        parts.store.write_reward(parts.learner.adapter(), round)
    vitals = training_vitals(groups, logprob_gap)
    version = None if of_reward else round + 1
    parts.state.committed(round, version, [group.sequence for group in groups], vitals, left_out)
    parts.save()
    if not of_reward:
        _deliver(parts)


def _deliver(parts: Parts) -> None:
    """The newest version goes to the run directory, unless it is there, and to the engine."""
    version, adapter = parts.state.admission.newest, parts.learner.adapter()
    parts.store.write_adapter(version, adapter, parts.config.model.name, parts.config)
    parts.engine.load_version(version, adapter)
    parts.scorer.judge.load_version(version, adapter)


def _state(store: RunStore) -> RunState:
    """Where an earlier call has left the run. Raises InputError if the service has worked in this run directory."""
    saved = store.read_json("state.json")
    if saved is not None and saved.get("by") != "loop":
        raise InputError(
            f"{store.root} holds a run of the service, expected one of this loop; go on with `rlsf run`, or give"
            " another folder"
        )
    return RunState(store.root, store.config, saved)


def _build(store: RunStore, state: RunState, on_status: OnStatus) -> Parts:
    """Make the parts, and bring them to the last finished round. Raises StorageError if its checkpoint is gone."""
    config, sets, ended = store.config, load_sets(store.config), state.admission.rounds_ended
    of_reward, newest, trained = config.trains_reward(ended), state.admission.newest, store.reward_round(ended)
    engine, learner = build_engine(placed(config, ONE_GPU)), Learner(config, reward=of_reward)
    parts = Parts(config, store, state, sets, engine, Scorer(config), learner, on_status)
    state.state = "running"
    if newest or (of_reward and trained is not None):
        learner.load_state_bytes(_read_checkpoint(store, newest - 1 if newest else trained or 0))
    if newest:
        _deliver(parts)
    if config.reward_model and ended > config.reward_model.rounds:
        _policy_begins(parts, learner if newest else None)
    return parts


def _policy_begins(parts: Parts, learner: Learner | None = None) -> None:
    """The rounds of the reward model are over; `learner`: the policy's, where it has begun in an earlier call.

    Raises NoPairsError if they had no pairs.
    """
    assert parts.config.reward_model is not None
    trained = parts.store.reward_round(parts.config.reward_model.rounds)
    if trained is None:
        raise parts.state.nothing_trained()
    parts.scorer.judge.load_reward(parts.store.read_reward(trained))
    if learner is None:
        del parts.learner  # the reward model's: one at a time in memory
        parts.learner = Learner(parts.config, steps_before=steps_in(_read_checkpoint(parts.store, trained)))


def _read_checkpoint(store: RunStore, round: int) -> bytes:
    found = store.storage.read(_checkpoint(round))
    if found is None:
        raise StorageError(
            f"round {round} is over, but {store.path(_checkpoint(round))} is missing; restore it from a copy, or begin"
            " a new run in another folder"
        )
    return found


def _checkpoint(round: int) -> str:
    return f"checkpoints/loop/round-{round:04d}.safetensors"


def step_row(report: StepReport) -> Json:
    """One line of metrics/train.jsonl: means over the step's pairs."""
    row: Json = {"time": time.time(), "round": report.round, "step": report.step, "pass": report.pass_index}
    row |= {"num_examples": report.num_examples, **report.means()}
    row |= {"grad_norm": report.grad_norm, "learning_rate": report.learning_rate}
    return row | {"logprob_gap": report.logprob_gap}
