"""The one validated configuration of a run, with every check across sections. `config_loading.py` fills it.

Importing this module needs neither torch nor Ray, so that a mistake is found before anything heavy starts.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from rlsf_ray.algorithms.signals import SIGNALS
from rlsf_ray.config_sections import (
    ROLES,
    SEVERAL_TURNS,
    UNCHECKED,
    AdvantagesConfig,
    ClusterConfig,
    DataConfig,
    EvalConfig,
    LearnerConfig,
    LossConfig,
    ModelConfig,
    PairsConfig,
    RewardModelConfig,
    RolloutConfig,
    Section,
    nearest,
    one_of,
)
from rlsf_ray.redaction import SECRET_NAME

NAME_CHARACTERS = "A-Za-z0-9._+=-"  # of a run's name, as a class of a regular expression


class RunConfig(Section):
    """A whole run. A recipe is a YAML file of these keys."""

    recipe: str = "rlsf"
    seed: int = Field(default=0, ge=0)
    rounds: PositiveInt = 2
    prompts_per_round: PositiveInt = 64
    model: ModelConfig = ModelConfig()
    engine: Literal["transformers", "vllm"] = "transformers"  # what writes the traces
    engine_args: dict[str, Any] = Field(default_factory=dict)  # vLLM's own, by the names of its AsyncEngineArgs
    swap: Literal["adapter", "merged"] | None = None  # how vLLM takes a version in; None: what is faster on the device
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    signal: Annotated[str, one_of("signal", tuple(SIGNALS))] = "disparity"
    # Who is asked how sure it is: the version that wrote a trace, or the base model. A second is only compared.
    judges: tuple[Literal["live", "frozen"], ...] = Field(default=("live",), min_length=1, max_length=2)
    pairs: PairsConfig = PairsConfig()
    loss: LossConfig = LossConfig()
    advantages: AdvantagesConfig | None = None  # None: learn from pairs
    reward_model: RewardModelConfig | None = None
    learner: LearnerConfig = LearnerConfig()
    cluster: ClusterConfig = ClusterConfig()
    eval: EvalConfig = EvalConfig()
    # What a sign of collapse does to the run; YAML reads a bare `off` as False
    guard: Annotated[
        Literal["off", "warn", "stop", "roll_back"], BeforeValidator(lambda v: "off" if v is False else v)
    ] = "roll_back"

    @property
    def default_name(self) -> str:
        """Of a run that is given none."""
        return re.sub(f"[^{NAME_CHARACTERS}]", "_", f"{self.recipe}-seed{self.seed}")

    @property
    def probe_prompts_per_call(self) -> int:
        """Probe prompts of one batch, so that it holds as many traces as a training batch."""
        return max(1, self.cluster.prompts_per_call * self.rollout.traces // self.eval.samples)

    def trains_reward(self, round: int) -> bool:
        """Does this round train the reward model, and not the policy?"""
        return self.reward_model is not None and round < self.reward_model.rounds

    def has_pairs(self, round: int) -> bool:
        """Does this round learn from pairs, and not from advantages?"""
        return self.advantages is None or self.trains_reward(round)

    @property
    def rewards_confidence(self) -> bool:
        """Is the policy rewarded for how sure it is, and not for what became of its turns?"""
        known = SIGNALS.get(self.signal)
        return self.advantages is not None and not (known and known.of_turns)

    def examples_per_step(self, round: int) -> int:
        """Pairs, or traces with an advantage, of one optimiser step."""
        pairs = self.learner.pairs_per_step
        return pairs if self.advantages is None or self.trains_reward(round) else self.advantages.traces_per_step

    def keeps_surest(self, round: int) -> bool:
        """Does this round learn from its surest prompts only?"""
        return self.pairs.surest is not None and self.has_pairs(round)

    def most_prompts(self, round: int, size: int) -> int | None:
        """How many prompts of the round, which has `size`, may be learned from; None: all."""
        if self.pairs.surest is None or not self.has_pairs(round):
            return None
        return max(1, math.floor(self.pairs.surest * size + 0.5))

    def epochs(self, round: int) -> int:
        """Passes over the round's groups."""
        return self.reward_model.epochs if self.reward_model and self.trains_reward(round) else self.learner.epochs

    def _refines(self) -> bool:
        """Is every second trace a refined answer to the draft before it? Of a user's own rollout we take it so."""
        return ":" in self.rollout.name or (self.rollout.name == "refine" and self.rollout.traces % 2 == 0)

    @model_validator(mode="after")
    def _check_engine(self) -> RunConfig:
        if self.rollout.name == "cot_decoding" and self.data.answer != "elicit" and self.rollout.max_tokens < 2:
            raise ValueError("rollout.max_tokens must be at least 2 for cot_decoding, got 1; raise it")
        if self.engine == "vllm" and self.cluster.generators.threads:
            raise ValueError(
                "vLLM divides cores by its own settings, got"
                f" cluster.generators.threads={self.cluster.generators.threads}; set it to 0, and"
                " VLLM_CPU_OMP_THREADS_BIND in the environment if need be"
            )
        if self.engine != "vllm" and (self.engine_args or self.swap):
            found = f"engine_args {sorted(self.engine_args)}" if self.engine_args else f"swap={self.swap}"
            raise ValueError(f"{found} is for vLLM, got engine={self.engine}; set engine: vllm")
        if self.engine_args.get("trust_remote_code"):
            raise ValueError(
                "engine_args.trust_remote_code would run Python from the model's folder, and trainer and scorers never"
                " do, got true; leave it out, and take a model that transformers knows"
            )
        if secret := next((key for key, value in self.engine_args.items() if _is_secret(key, value)), None):
            raise ValueError(
                f"the run directory keeps engine_args as they are, got a text for {secret} (not shown); leave it out,"
                " and set it in the environment of every node, such as HF_TOKEN for the hub"
            )
        trainers = self.cluster.trainers
        if trainers.at_most > 1 and not (trainers.gpus or 0.0).is_integer():
            raise ValueError(
                "cluster.trainers.gpus must be 0 or a whole number where there are several (NCCL needs whole GPUs),"
                f" got {trainers.gpus} for {trainers.at_most}; set it to 1"
            )
        return self

    @model_validator(mode="after")
    def _check_pairs(self) -> RunConfig:
        if not self.has_pairs(0):
            return self
        if self.pairs.surest is not None and self.pairs.rule in ("random", "format_only"):
            raise ValueError(
                f"pairs.surest compares prompts by how sure a rule is of them, got pairs.rule={self.pairs.rule}, which"
                " is of none; set pairs.surest: null"
            )
        if self.pairs.rule == "final_over_first" and not self._refines():
            raise ValueError(
                "pairs.rule=final_over_first sets every second trace over the one before it, got"
                f" rollout.name={self.rollout.name}, rollout.traces={self.rollout.traces}; use rollout.name: refine"
                " and an even number"
            )
        if self.pairs.rule == "all_above" and self.pairs.min_chosen > 1.0:
            raise ValueError(
                "pairs.min_chosen is compared with a score of at most 1 under all_above, got"
                f" {self.pairs.min_chosen}; set it between 0 and 1"
            )
        if self.pairs.rule in ("voted", "reversed") and self.signal in SIGNALS and not SIGNALS[self.signal].bounded:
            raise ValueError(
                f"pairs.rule={self.pairs.rule} adds up scores as weights of answers and needs a signal between 0 and 1,"
                f" got signal={self.signal}; use answer_prob, or pairs.rule=best_worst"
            )
        if self.loss.name == "ipo" and self.loss.label_smoothing:
            raise ValueError(
                f"ipo has no label smoothing, got loss.label_smoothing={self.loss.label_smoothing}; set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _check_advantages(self) -> RunConfig:
        if len(set(self.judges)) < len(self.judges):
            raise ValueError(f"judges are compared with each other, got {list(self.judges)}; name each once")
        if self.judges != ("live",) and self.signal in SIGNALS and SIGNALS[self.signal].needs == {"text"}:
            raise ValueError(
                f"signal={self.signal} compares answers and asks no model, got judges={list(self.judges)}; leave it out"
            )
        if self.advantages and self.rollout.name in ("cot_decoding", "refine"):
            raise ValueError(
                f"advantages need traces that the policy draws, got rollout.name={self.rollout.name}; set rollout.name:"
                " sample, or leave `advantages` out to learn from pairs"
            )
        return self

    @model_validator(mode="after")
    def _check_turns(self) -> RunConfig:
        name, signal = self.rollout.name, SIGNALS.get(self.signal)
        if name in SEVERAL_TURNS:
            if self.model.chat == "plain" or self.data.answer == "elicit":
                raise ValueError(
                    f"rollout.name={name} has several turns and needs a chat template, and answers that stand in the"
                    f" text, got model.chat={self.model.chat}, data.answer={self.data.answer}; set model.chat: template"
                )
            if signal and signal.of_turns and name in UNCHECKED:
                raise ValueError(
                    f"signal={self.signal} needs answers that were checked, and rollout.name={name} checks none; use"
                    " self_consistency, or another rollout"
                )
            if signal and "text" not in signal.needs:
                raise ValueError(
                    f"signal={self.signal} is about all tokens of a trace, and rollout.name={name} has some that nobody"
                    " drew; use passed, or a signal of the answer, such as answer_prob"
                )
        elif ":" not in name and ((signal and signal.of_turns) or (self.advantages and self.advantages.turns)):
            what = f"signal={self.signal}" if signal and signal.of_turns else "advantages.turns"
            raise ValueError(
                f"{what} is for rollouts of several turns, got rollout.name={name}; expected one of"
                f" {', '.join(SEVERAL_TURNS)}"
            )
        return self

    @model_validator(mode="after")
    def _check_roles(self) -> RunConfig:
        name, settings = self.rollout.name, self.advantages
        if settings and settings.held_turns and not settings.kl:
            raise ValueError("advantages.held_turns feel the KL penalty only, got kl=0; set advantages.kl: 0.1")
        if self.rollout.uncredited_temperature is not None and not (settings and settings.turns):
            raise ValueError(
                "rollout.uncredited_temperature is for turns beside those of advantages.turns, got none there; leave it"
                " out, or name the turns"
            )
        roles = [*settings.turns, *settings.held_turns] if settings else []
        if ":" not in name and (odd := [role for role in roles if role not in ROLES]):
            raise ValueError(f"no turn has the role {odd[0]!r}; expected {', '.join(ROLES)}{nearest(odd[0], ROLES)}")
        if len(set(roles)) < len(roles):
            raise ValueError(f"advantages.turns and advantages.held_turns name a role twice: {roles}; name each once")
        return self

    @model_validator(mode="after")
    def _check_reward_model(self) -> RunConfig:
        settings = self.reward_model
        if settings is None:
            return self
        if self.advantages is None:
            raise ValueError("a reward_model gives rewards, got no `advantages` to learn from them; set advantages: {}")
        if settings.rounds >= self.rounds:
            raise ValueError(
                f"reward_model.rounds must leave rounds for the policy, got {settings.rounds} of rounds={self.rounds};"
                " lower it"
            )
        if self.cluster.max_staleness or self.judges != ("live",):
            raise ValueError(
                "a reward_model waits for its last round and judges alone, got cluster.max_staleness="
                f"{self.cluster.max_staleness}, judges={list(self.judges)}; set max_staleness: 0 and judges: [live]"
            )
        return self


def _is_secret(key: str, value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(SECRET_NAME, key, re.IGNORECASE) is not None
