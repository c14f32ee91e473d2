"""Rollout programs: groups with seeds, answers where they stand, and RLSF's own way to find them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_config

from rlsf_ray.config import RunConfig
from rlsf_ray.engines.base import Completion, Request
from rlsf_ray.engines.transformers_engine import TransformersEngine
from rlsf_ray.errors import InputError
from rlsf_ray.records import Group, IntArray, Prompt
from rlsf_ray.rollouts.programs import trace_seed, write_calibration_groups, write_groups, write_probe_groups
from rlsf_ray.rollouts.several import says_yes


@pytest.fixture(scope="module")
def engine(tiny: Path) -> TransformersEngine:
    config = tiny_config(tiny)
    return TransformersEngine(config.model, config.learner)


def prompts(number: int, answer_format: str = "number") -> list[Prompt]:
    texts = [f"State the final answer: {n} + 3 =" for n in range(number)]
    return [
        Prompt(id=f"p{n}", messages=(("user", text),), task="t", key=text, answer_format=answer_format)
        for n, text in enumerate(texts)
    ]


def write(engine: TransformersEngine, config: RunConfig, number: int = 3, round: int = 0) -> list[Group]:
    return write_groups(engine, prompts(number), config=config, round=round, first_sequence=10, version=0)


def test_groups_keep_order_identity_and_version(engine: TransformersEngine, config: RunConfig) -> None:
    groups = write(engine, config)
    assert [group.id for group in groups] == ["r0/p0", "r0/p1", "r0/p2"]
    assert [group.sequence for group in groups] == [10, 11, 12]
    assert groups[1].traces[3].id == "r0/p1/3"
    assert {trace.version for group in groups for trace in group.traces} == {0}
    assert len({trace.seed for group in groups for trace in group.traces}) == 12


def test_the_same_round_repeats_and_another_round_or_seed_does_not(
    engine: TransformersEngine, config: RunConfig, tiny: Path
) -> None:
    def texts(groups: list[Group]) -> list[str]:
        return [trace.text for group in groups for trace in group.traces]

    first = texts(write(engine, config))
    assert first == texts(write(engine, config))
    assert first != texts(write(engine, config, round=1))
    assert first != texts(write(engine, tiny_config(tiny, seed=1)))


def test_an_answer_span_holds_the_answer_in_characters_and_tokens(
    engine: TransformersEngine, config: RunConfig
) -> None:
    found = [trace for group in write(engine, config, 6) for trace in group.traces if trace.answer]
    assert len(found) > 10
    for trace in found:
        assert trace.answer is not None
        assert trace.text[slice(*trace.answer.chars)] == trace.answer.text
        piece = engine._tokenizer.decode(trace.token_ids[slice(*trace.answer.tokens)])
        assert trace.answer.text in piece
        assert float(trace.answer.text) == float(piece.strip().rstrip("."))


def test_a_trace_that_was_cut_off_has_no_answer(engine: TransformersEngine, tiny: Path) -> None:
    config = tiny_config(tiny, rollout={"max_tokens": 4})
    traces = [trace for group in write(engine, config) for trace in group.traces]
    assert not any(trace.finished for trace in traces)
    assert all(trace.answer is None for trace in traces)


def test_probe_groups_do_not_depend_on_the_run_seed(engine: TransformersEngine, config: RunConfig, tiny: Path) -> None:
    def texts(with_config: RunConfig) -> list[str]:
        written = write_probe_groups(engine, prompts(2), config=with_config, version=0, first_sequence=0)
        sampled, greedy = written["sampled"], written["greedy"]
        assert list(written) == ["sampled", "greedy"]
        assert [len(group.traces) for group in sampled] == [2, 2]
        assert [len(group.traces) for group in greedy] == [1, 1]
        return [trace.text for group in [*sampled, *greedy] for trace in group.traces]

    assert texts(config) == texts(tiny_config(tiny, seed=7))


def test_cot_decoding_branches_on_the_first_token(engine: TransformersEngine, tiny: Path) -> None:
    group = write(engine, tiny_config(tiny, rollout={"name": "cot_decoding", "traces": 5}), 1)[0]
    assert len({int(trace.token_ids[0]) for trace in group.traces}) == 5


def test_calibration_groups_have_other_seeds_than_the_probe_set(engine: TransformersEngine, config: RunConfig) -> None:
    groups = write_calibration_groups(engine, prompts(2), config=config, version=0, first_sequence=4)
    probed = write_probe_groups(engine, prompts(2), config=config, version=0, first_sequence=4)["sampled"]
    assert [len(group.traces) for group in groups] == [4, 4]
    assert [group.sequence for group in groups] == [4, 5]
    assert not {t.seed for g in groups for t in g.traces} & {t.seed for g in probed for t in g.traces}


def test_branches_are_measured_where_they_are_asked_for(engine: TransformersEngine, tiny: Path) -> None:
    asked = tiny_config(tiny, eval={"branches": 3})
    written = write_probe_groups(engine, prompts(2), config=asked, version=0, first_sequence=0)
    assert [len(group.traces) for group in written["branches"]] == [3, 3]
    assert all(len({int(t.token_ids[0]) for t in group.traces}) == 3 for group in written["branches"])


def test_branches_are_not_in_one_batch_with_the_other_traces(
    engine: TransformersEngine, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []

    def generate(requests: Sequence[Request], version: int) -> list[list[Completion]]:
        calls.append(sorted({request.sampling.method for request in requests}))
        return real(requests, version)

    real = engine.generate
    monkeypatch.setattr(engine, "generate", generate)
    write_probe_groups(engine, prompts(2), config=tiny_config(tiny, eval={"branches": 3}), version=0, first_sequence=0)
    assert calls == [["greedy", "sample"], ["branch"]]


def test_an_unknown_rollout_names_the_known_ones(engine: TransformersEngine, config: RunConfig) -> None:
    wrong = config.model_copy(update={"rollout": config.rollout.model_copy(update={"name": "smaple"})})
    with pytest.raises(InputError, match="did you mean 'sample'"):
        write(engine, wrong)


class ScriptedEngine:
    """Writes one fixed text, and `elicited` when it is asked to go on after "So the answer is"."""

    def __init__(self, text: str, elicited: str) -> None:
        self.text, self.elicited, self.asked = text, elicited, list[list[int]]()

    def encode(self, prompt: Prompt) -> IntArray:
        return np.array([1, 2], dtype=np.int32)

    def encode_text(self, text: str) -> IntArray:
        assert text == " So the answer is"
        return np.array([77, 78], dtype=np.int32)

    def generate(self, requests: Sequence[Request], version: int) -> list[list[Completion]]:
        follow_up = requests[0].prompt_ids[-1] == 78
        self.asked += [request.prompt_ids.tolist() for request in requests]
        text = self.elicited if follow_up else self.text
        size = len(text) + 1  # a token for each character, and the end
        spans = np.array([[min(i, len(text)), min(i + 1, len(text))] for i in range(size)], dtype=np.int32)
        numbers = np.full(size, 0.5, dtype=np.float32)
        completion = Completion(
            token_ids=np.arange(size, dtype=np.int32) + 10,
            logprob=numbers,
            top1=numbers,
            top2=numbers,
            text=text,
            char_spans=spans,
            finished=True,
        )
        return [[completion] * len(request.seeds) for request in requests]


def test_elicited_answers_are_found_in_the_trace_itself(config: RunConfig) -> None:
    """RLSF 1.1 step 3: the elicited "12" stands last at characters 14-16 of the trace."""
    engine = ScriptedEngine("12 eggs, then 12.", " 12")
    group = write_groups(engine, prompts(1, "elicit"), config=config, round=0, first_sequence=0, version=0)[0]
    answer = group.traces[0].answer
    assert answer is not None
    assert (answer.text, answer.chars, answer.tokens) == ("12", (14, 16), (14, 16))
    end = 10 + len(engine.text)
    assert engine.asked[1] == [1, 2, *range(10, end), 77, 78], "prompt, trace without its end token, the question"


def test_an_elicited_answer_that_is_not_in_the_trace_is_no_answer(config: RunConfig) -> None:
    engine = ScriptedEngine("I do not know.", " 12")
    group = write_groups(engine, prompts(1, "elicit"), config=config, round=0, first_sequence=0, version=0)[0]
    assert group.traces[0].answer is None


def test_seeds_fit_a_signed_64_bit_column() -> None:
    seeds = [trace_seed("0/round-0", f"p{n}", 0) for n in range(200)]
    assert len(set(seeds)) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("verdict", "yes"),
    [
        ("Yes.", True),
        ("**Yes**, it is.", True),
        ('"Yes"', True),
        ("Correct!", True),
        ("The answer is correct.", True),
        ("It is correct", True),
        ("No", False),
        ("Correction: it should be 12", False),
        ("Correctness is in doubt", False),
        ("The answer is not correct", False),
        ("yesterday", False),
        ("", False),
    ],
)
def test_a_verdict_is_read_by_how_it_begins(verdict: str, yes: bool) -> None:
    assert says_yes(verdict) is yes
