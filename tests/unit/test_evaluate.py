"""Evaluation against tables worked out by hand."""

from __future__ import annotations

import ast
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_config

from rlsf_ray import base_cache, evaluate
from rlsf_ray.config import RunConfig
from rlsf_ray.engines.base import Completion, Request
from rlsf_ray.records import Answer, Check, Group, IntArray, Json, ProbePrompt, Prompt, Trace
from rlsf_ray.stream.guard import flipped
from rlsf_ray.tasks import checks
from rlsf_ray.tasks.equality import AnswerChecker
from rlsf_ray.tasks.sources import PromptSets
from rlsf_ray.tasks.verdict import Verdict


def trace(index: int, answer: str | None, probability: float, *, finished: bool = True) -> Trace:
    tokens = np.array([1, 2], dtype=np.int32)
    logprob = np.log(np.array([0.9, probability], dtype=np.float32))
    return Trace(
        id=str(index),
        index=index,
        seed=index,
        version=0,
        text=f"so {answer}",
        token_ids=tokens,
        logprob=logprob,
        top1=np.exp(logprob),
        top2=np.zeros(2, dtype=np.float32),
        finished=finished,
        answer=Answer(text=answer, chars=(3, 3 + len(answer)), tokens=(1, 2)) if answer else None,
    )


def probe(name: str, gold: str) -> ProbePrompt:
    return ProbePrompt(prompt=Prompt(id=name, messages=(("user", name),), task="t", key=name), gold=gold)


def group(name: str, *traces: Trace) -> Group:
    prompt = Prompt(id=name, messages=(("user", name),), task="t", key=name)
    ids = np.array([1], dtype=np.int32)
    return Group(id=f"probe/{name}", round=-1, sequence=0, version=0, prompt=prompt, prompt_ids=ids, traces=traces)


def sets(*items: ProbePrompt) -> PromptSets:
    return PromptSets(train=[], probe=list(items), calibration=[])


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Question a: 4, 4, 5, none with gold 4; question b: 7, 8, 8, cut off with gold 7."""
    first = group("a", trace(0, "4", 0.8), trace(1, "4.0", 0.6), trace(2, "5", 0.5), trace(3, None, 0.9))
    second = group("b", trace(0, "7", 0.4), trace(1, "8", 0.9), trace(2, "8", 0.7), trace(3, None, 0.9, finished=False))
    greedy = [group("a", trace(0, "4", 0.8)), group("b", trace(0, "8", 0.8))]
    with AnswerChecker() as checker:
        written = {"sampled": [first, second], "greedy": greedy}
        return evaluate.judge_groups(written, [probe("a", "4"), probe("b", "7")], checker)


def test_metrics_by_hand(rows: list[dict[str, Any]], config: RunConfig) -> None:
    found = evaluate.summarise(rows, 3, config, evaluate.Unlabelled(None, None, {}))
    metrics = found["metrics"]
    assert metrics["greedy_accuracy"] == 0.5
    assert metrics["sampled_accuracy"] == 3 / 8  # two of a, one of b
    assert metrics["majority_accuracy"] == 0.5  # a: 4 twice, right; b: 8 twice, wrong
    assert metrics["parsed"] == 6 / 8
    assert metrics["cut_off"] == 1 / 8
    assert metrics["mean_length"] == 2
    # Brier of the answer probability: right .8 .6 .4 -> .04 .16 .36; wrong .5 .9 .7 -> .25 .81 .49; two unparsed 0
    assert metrics["brier_answer_prob"] == pytest.approx(2.11 / 8, abs=1e-6)
    # leave-one-out agreement: a 1/3 1/3 0 0; b 0 1/3 1/3 0
    assert [sample["agreement"] for row in rows for sample in row["samples"]] == pytest.approx(
        [1 / 3, 1 / 3, 0, 0, 0, 1 / 3, 1 / 3, 0]
    )
    # its ECE: bin of 1/3 holds four, half right: |1/3 - 1/2| * 4/8; bin of 0 holds four, one right: 1/4 * 4/8
    assert metrics["ece_agreement"] == pytest.approx(1 / 12 + 1 / 8)
    # AUROC of the answer probability: right .8 .6 .4 against wrong .5 .9 .7 0 0: 4 + 3 + 2 wins of 15
    assert metrics["auroc_answer_prob"] == pytest.approx(9 / 15)
    assert found["reliability"]["answer_prob"][0][2] == 2, "two unparsed traces lie in the lowest bin"
    assert metrics["sampled_accuracy_low"] <= 3 / 8 <= metrics["sampled_accuracy_high"]
    json.dumps(found)


def test_the_rise_is_paired_over_shared_questions(rows: list[dict[str, Any]]) -> None:
    """Question a rises from 2/4 to 4/4, b stays at 1/4: mean rise 1/4; question c is not shared."""
    better = json.loads(json.dumps(rows))
    for sample in better[0]["samples"]:
        sample["correct"] = True
    extra = [{"id": "c", "samples": [{"correct": True}]}]
    rise, low, high = evaluate.difference({"questions": rows}, {"questions": better + extra})["sampled_accuracy"]
    assert rise == pytest.approx(0.25)
    assert (low, high) == (0.0, 0.5)


def test_the_cache_is_keyed_by_model_probe_set_and_sampling(tiny: Path, config: RunConfig) -> None:
    first, second = probe("a", "4"), probe("b", "7")
    items = sets(first, second)
    assert base_cache.cached_base(config, items) is None
    base_cache.store_base(config, items, {"version": 0})
    assert base_cache.cached_base(config, items) == {"version": 0}
    assert base_cache.cached_base(tiny_config(tiny, seed=5), items) == {"version": 0}, "the run's seed does not matter"
    assert base_cache.cached_base(tiny_config(tiny, eval={"samples": 3}), items) is None
    assert base_cache.cached_base(tiny_config(tiny, rollout={"temperature": 0.5}), items) is None
    assert base_cache.cached_base(config, sets(first)) is None
    assert base_cache.cached_base(config, sets(probe("a", "5"), second)) is None
    unlabelled = items._replace(calibration=[second.prompt])
    assert base_cache.cached_base(config, unlabelled) is None


def test_all_of_ours_that_judges_is_in_the_key_of_the_cache() -> None:
    """What the judges import is a judge, too. Left out: what is in the key otherwise, or only stores and names."""
    other = ("config", "config_sections", "errors", "choices", "run_store", "engines.", "stream.guard", "tasks.sources")
    judges = {str(part.__name__) for part in base_cache.JUDGES}
    for part in base_cache.JUDGES:
        tree = ast.parse(Path(str(part.__file__)).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("rlsf_ray."):
                below = (f"{node.module}.{alias.name}" for alias in node.names)
                modules = [name for name in below if importlib.util.find_spec(name)] if _is_package(node) else []
                for module in modules or [str(node.module)]:
                    known = module in judges or module.removeprefix("rlsf_ray.").startswith(other)
                    assert known, f"{part.__name__} imports {module}, which base_cache.JUDGES lacks"


def _is_package(node: ast.ImportFrom) -> bool:
    spec = importlib.util.find_spec(str(node.module))
    return spec is not None and spec.submodule_search_locations is not None


def test_other_weights_are_another_model(tiny: Path, config: RunConfig, tmp_path: Path) -> None:
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    copied = tiny_config(tmp_path)
    base_cache.store_base(copied, sets(probe("a", "4")), {"version": 0})
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert base_cache.cached_base(copied, sets(probe("a", "4"))) is None


def answered(name: str, draw: np.random.Generator) -> Group:
    """Eight traces: the sure ones say 4, the others anything."""
    traces = []
    for index in range(8):
        sure = draw.random() < 0.5
        traces.append(trace(index, "4" if sure else str(draw.integers(10, 99)), 0.9 if sure else 0.3))
    return group(name, *traces)


def test_the_map_tells_agreement_from_one_trace(config: RunConfig) -> None:
    draw = np.random.default_rng(0)
    with AnswerChecker() as checker:
        unlabelled = evaluate.look_at([answered(str(i), draw) for i in range(30)], None, checker)
        assert evaluate.look_at([answered("few", draw)], None, checker).map is None
        assert evaluate.look_at([], None, checker) == evaluate.Unlabelled(None, None, {})
        written = {"sampled": [answered("q", draw)], "greedy": [group("q", trace(0, None, 0.5))]}
        rows = evaluate.judge_groups(written, [probe("q", "4")], checker)
    found = evaluate.summarise(rows, 1, config, unlabelled)
    samples = found["questions"][0]["samples"]
    sure = [s["calibrated"] for s in samples if s["answer"] == "4"]
    unsure = [s["calibrated"] for s in samples if s["answer"] != "4"]
    assert min(sure) > 0.35 > 0.15 > max(unsure)  # half of the others say 4 as well; nobody else says 57
    assert found["calibration"]["num_traces"] == 240
    assert found["vitals"]["parsed"] == 1.0
    assert found["metrics"]["brier_skill_calibrated"] > 0


def test_a_version_that_agrees_with_itself_alone_is_half_as_sure() -> None:
    """Every trace says 4; the version before said 7 for every second prompt."""
    groups = [group(str(i), *[trace(k, "4", 0.9) for k in range(8)]) for i in range(10)]
    earlier = {str(i): ["7" if i % 2 else "4.0"] * 8 for i in range(10)}
    row = np.array([evaluate.trace_features(groups[0].traces[0])])
    with AnswerChecker() as checker:
        alone, both = (evaluate.look_at(groups, said, checker) for said in (None, earlier))
    assert alone.map is not None
    assert both.map is not None
    assert alone.map(row)[0] > 0.98
    assert both.map(row)[0] == pytest.approx(0.75, abs=0.01)
    assert (both.vitals, alone.answers) == (alone.vitals, {str(i): ["4"] * 8 for i in range(10)})


def test_a_vote_that_is_written_otherwise_than_before_has_not_changed() -> None:
    """Three versions: each answer keeps the notation that it came with first."""
    said: list[Json] = []
    votes = []
    with AnswerChecker() as checker:
        for text in (r"\frac{1}{2}", "1/2", "0.5"):
            groups = [group(str(i), *[trace(k, text if i else "7", 0.9) for k in range(4)]) for i in range(8)]
            looked = evaluate.look_at(groups, said[-1] if said else None, checker)
            said.append(looked.answers)
            assert looked.vitals is not None
            votes.append(looked.vitals.votes)
    assert votes[0] == votes[1] == votes[2]
    assert votes[0]["0"] == "7"
    assert flipped(votes[0], votes[2]) == 0.0


class Drawing:
    """An engine whose answers follow from the seeds alone: 4 with a high probability, or any number with a low one."""

    def encode(self, prompt: Prompt) -> IntArray:
        return np.array([1], dtype=np.int32)

    def generate(self, requests: list[Request], version: int) -> list[list[Completion]]:
        return [[self._write(seed) for seed in request.seeds] for request in requests]

    def _write(self, seed: int) -> Completion:
        draw = np.random.default_rng(seed)
        text, prob = ("4", 0.9) if draw.random() < 0.5 else (str(draw.integers(5, 10)), 0.3)
        numbers = np.array([prob, 0.9], dtype=np.float32)
        return Completion(
            token_ids=np.array([7, 2], dtype=np.int32),
            logprob=np.log(numbers),
            top1=numbers,
            top2=np.zeros(2, dtype=np.float32),
            text=text,
            char_spans=np.array([[0, 1], [1, 1]], dtype=np.int32),
            finished=True,
        )


def test_no_gold_answer_can_reach_the_map_or_the_guard(tiny: Path) -> None:
    """Whatever the gold answers say, map, confidences and vitals are the same to the last bit; only metrics differ."""
    config = tiny_config(tiny, rollout={"traces": 8})
    unlabelled = [probe(f"c{i}", "").prompt for i in range(24)]
    found = [
        evaluate.evaluate_version(
            Drawing(), PromptSets([], [probe(f"p{i}", gold) for i in range(6)], unlabelled), config, 1
        )
        for gold in ("4", "-1")
    ]
    assert found[0]["metrics"]["sampled_accuracy"] > 0.2
    assert found[1]["metrics"]["sampled_accuracy"] == 0.0
    assert found[0]["calibration"]["num_traces"] == 96
    for key in ("calibration", "vitals"):
        assert found[0][key] == found[1][key]
    confidences = [[s["calibrated"] for q in one["questions"] for s in q["samples"]] for one in found]
    assert confidences[0] == confidences[1]
    assert "gold" not in {field for record in (Group, Trace, Prompt) for field in record.__dataclass_fields__}


def test_an_answer_whose_check_could_not_be_made_is_told_apart(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts as wrong in the accuracies, and its share stands beside them."""
    monkeypatch.setitem(checks.CHECKS, "exact", lambda text, accepted: Verdict(None if text == "4" else False))
    asked = [probe(f"p{i}", "4") for i in range(6)]
    check = Check(kind="exact", data={"accepted": ["4"]})
    asked = [replace(item, prompt=replace(item.prompt, check=check)) for item in asked]
    found = evaluate.evaluate_version(Drawing(), PromptSets([], asked, []), tiny_config(tiny), 1)
    samples = [sample for question in found["questions"] for sample in question["samples"]]
    assert {(sample["answer"] == "4", sample["unchecked"]) for sample in samples} == {(True, True), (False, False)}
    assert found["metrics"]["sampled_accuracy"] == 0.0
    assert found["metrics"]["unchecked"] == np.mean([sample["answer"] == "4" for sample in samples])
