"""Frozen records that cross a boundary between stages. Lengths are checked once, here.

Letters in shapes: P prompt tokens, T tokens of one trace, K traces of a group.
Records on the training side (`Prompt` to `TrainingGroup`) have no field for a gold answer.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]
Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """How a task tells by itself whether an answer solves it: a kind of tasks/checks.py, and what that needs to know.

    It comes with the question (the numbers of a countdown); where it holds wanted answers, it is a label, and named so.
    """

    kind: str
    data: Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A question for the policy. `key` is its canonical form: equal questions have equal keys."""

    id: str
    messages: tuple[tuple[str, str], ...]  # (role, content)
    task: str
    key: str
    answer_format: str = "number"  # how the answer is found in a trace: see algorithms/answers.py
    check: Check | None = None  # for rollouts that ask whether an answer is right


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbePrompt:
    """A held-out prompt with its gold answer. Only evaluation may hold one."""

    prompt: Prompt
    gold: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The final answer of a trace and where it stands."""

    text: str
    chars: tuple[int, int]  # [start, end) in the trace's text
    tokens: tuple[int, int]  # [start, end) in the trace's tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What the model wrote in one go, in a trace of several turns."""

    role: str  # attempt, reflection, retry, critique, verdict ...
    tokens: tuple[int, int]  # [start, end) in the trace's tokens
    text: str
    said: str = ""  # the user's reply before it; the first turn has none
    answer: str | None = None
    passed: float = float("nan")  # 1 or 0 by a check; nan: not checked, or the check failed to run


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One sampled completion. Statistics are of the raw distribution (temperature 1).

    `logprob` [T] is the log-probability of the chosen token, `top1` and `top2` [T] the two largest
    probabilities at its position. A trace of several `turns` also holds the tokens that stand between them, which
    nobody drew (their log-prob is 0); `text`, `finished` and `answer` are then those of the last turn that answers the
    prompt. `char_ends` [T]: how far each token reaches into the text of its turn, in characters, for those who show it.
    """

    id: str
    index: int
    seed: int
    version: int
    text: str
    token_ids: IntArray
    logprob: FloatArray
    top1: FloatArray
    top2: FloatArray
    finished: bool  # False: cut off at the token limit
    answer: Answer | None = None
    turns: tuple[Turn, ...] = ()  # none: the whole trace was written in one go
    char_ends: IntArray | None = None

    def __post_init__(self) -> None:
        ends = self.token_ids if self.char_ends is None else self.char_ends
        lengths = {len(self.token_ids), len(self.logprob), len(self.top1), len(self.top2), len(ends)}
        if len(lengths) != 1:
            raise ValueError(
                f"trace {self.id}: token_ids, logprob, top1, top2, char_ends must have one length, got {lengths}"
            )
        if self.answer is not None and self.answer.tokens[1] > len(self.token_ids):
            raise ValueError(f"trace {self.id}: answer span {self.answer.tokens} outside {len(self.token_ids)} tokens")

    def written(self, roles: Collection[str] = ()) -> NDArray[np.bool_]:
        """Which tokens [T] the model wrote, in turns of these roles (none: of any)."""
        if not self.turns:
            return np.ones(len(self.token_ids), dtype=np.bool_)
        mask = np.zeros(len(self.token_ids), dtype=np.bool_)
        for turn in self.turns:
            if not roles or turn.role in roles:
                mask[slice(*turn.tokens)] = True
        return mask

    @property
    def answer_text(self) -> str | None:
        """The answer as it was written, None without one."""
        return self.answer.text if self.answer else None

    @property
    def answer_prob(self) -> float:
        """Probability of the answer's tokens given all before them, 0 without an answer."""
        return float(np.exp(self.logprob[slice(*self.answer.tokens)].sum(dtype=np.float64))) if self.answer else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A prompt and its K traces, made in one round by one version."""

    id: str
    round: int
    sequence: int  # admission order within the round
    version: int
    prompt: Prompt
    prompt_ids: IntArray  # [P]
    traces: tuple[Trace, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One preference. `chosen` and `rejected` index the traces of the record that holds the pair."""

    chosen: int
    rejected: int
    weight: float = 1.0
    margin: float = 0.0  # gap of the two scores


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """A group with one score for each trace (nan: absent), its answer classes, and its pairs or advantages.

    `labels` [K] numbers the distinct answers (equal answers share a number, -1: no answer). `advantages` [K] are absent
    (nan) for traces that take no part. `reason` names why nothing is learned from the group; None when something is.
    `second_scores`: by the second judge, if any.
    """

    group: Group
    signal: str
    scores: tuple[float, ...]
    labels: tuple[int, ...]
    pairs: tuple[Pair, ...] = ()
    advantages: tuple[float, ...] = ()
    reason: str | None = None
    sure: float = 0.0  # how sure the pair rule is of this prompt, beside others
    second_scores: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        num_traces = len(self.group.traces)
        if len(self.scores) != num_traces or len(self.labels) != num_traces:
            raise ValueError(
                f"group {self.group.id}: {num_traces} traces, {len(self.scores)} scores, {len(self.labels)} labels"
            )
        if bool(self.pairs) + bool(self.advantages) + (self.reason is not None) != 1:
            raise ValueError(
                f"group {self.group.id}: needs pairs, advantages or a reason, got {self.pairs}, {self.advantages},"
                f" {self.reason}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingTrace:
    """What the learner needs of a trace, and the provenance a pair is stored with."""

    id: str
    seed: int
    version: int
    score: float
    answer: str | None
    token_ids: IntArray  # [T]
    logprob: FloatArray  # [T], by the policy that wrote them; at another temperature than 1 as a scorer reads it
    reference_logprob: FloatArray  # [T], of the frozen base model
    credit: FloatArray | None = None  # [T]: advantage of each token (1 in a pair), nan: not learned from; None: all 1

    def __post_init__(self) -> None:
        credit = self.logprob if self.credit is None else self.credit
        if not len(self.token_ids) == len(self.logprob) == len(self.reference_logprob) == len(credit):
            raise ValueError(
                f"trace {self.id}: {len(self.token_ids)} tokens, but {len(self.logprob)} log-probs,"
                f" {len(self.reference_logprob)} reference log-probs and credit for {len(credit)}"
            )

    @property
    def learned(self) -> NDArray[np.bool_]:
        """Which tokens [T] the loss sees."""
        return np.ones(len(self.token_ids), dtype=np.bool_) if self.credit is None else ~np.isnan(self.credit)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingGroup:
    """A prompt with the traces that are learned from, each once; by `pairs`, which index them, or by advantages."""

    id: str
    round: int
    sequence: int
    prompt_id: str
    signal: str
    prompt_ids: IntArray  # [P]
    traces: tuple[TrainingTrace, ...]
    pairs: tuple[Pair, ...]
    sure: float = 0.0  # see ScoredGroup

    @property
    def num_examples(self) -> int:
        """What the loss is a sum over: pairs or, without any, traces."""
        return len(self.pairs) or len(self.traces)

    @property
    def example_ids(self) -> list[str]:
        """A name for each example: `chosen > rejected` by the ids of the traces or, without pairs, the trace's id."""
        ids = [trace.id for trace in self.traces]
        return [f"{ids[pair.chosen]} > {ids[pair.rejected]}" for pair in self.pairs] or ids

    @property
    def num_tokens(self) -> int:
        """Tokens one pass over this group costs when its prompt is shared."""
        return len(self.prompt_ids) + sum(len(trace.token_ids) for trace in self.traces)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one (prompt, round) ended at the scorer: with pairs, or filtered for a named reason."""

    group_id: str
    sequence: int
    num_traces: int
    num_tokens: int
    num_cut_off: int
    num_parsed: int
    num_examples: int
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsVersion:
    """A published adapter: the whole number that names it, its content's checksum, its folder."""

    version: int
    checksum: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """A trace and the log-probs [T] that the trainer gave its tokens under the last version and under the new one."""

    prompt_ids: IntArray  # [P]
    token_ids: IntArray  # [T]
    before: FloatArray
    after: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimiser step: sums over examples (pairs, or traces with an advantage), divided by the reader."""

    round: int
    step: int
    pass_index: int
    num_examples: int
    sums: dict[str, float] = field(default_factory=dict)  # loss and others, by the objective's names
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    logprob_gap: float = 0.0  # root mean square over tokens, in nats: the trainer's log-prob minus the generator's

    def means(self) -> dict[str, float]:
        return {name: value / max(1, self.num_examples) for name, value in self.sums.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """To a user's question: the voted answer (None: abstained, or no trace had one) and what it took."""

    question: str
    answer: str | None
    confidence: float  # calibrated, in [0, 1]
    traces: int
    version: int
