"""The model as a judge: the right weights read the right tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from advantage_runs import REWARD
from group_data import advantage_group, group, trace
from tiny import tiny_config

from rlsf_ray.config import RunConfig
from rlsf_ray.engines.judge import Judge
from rlsf_ray.engines.learner import Learner
from rlsf_ray.engines.lora import HEAD_WEIGHT, add_adapter, add_reward_head, load_adapter
from rlsf_ray.engines.models import load_model, load_tokenizer
from rlsf_ray.engines.objectives import BradleyTerry, rewards_of, rows_of
from rlsf_ray.engines.scorer import Scorer
from rlsf_ray.engines.steps import StepSize
from rlsf_ray.engines.tokens import P_TRUE, encode_prompt
from rlsf_ray.errors import EngineError
from rlsf_ray.records import Pair

DISTRIBUTION = frozenset({"distribution"})


def config(tiny: Path, **more: object) -> RunConfig:
    return tiny_config(tiny, pairs={"rule": "best_worst"}, **more)


def moved_adapter(tiny: Path, scale: float = 0.3) -> dict[str, np.ndarray]:
    """An adapter that does something: B is drawn, not zero."""
    rng = np.random.default_rng(1)
    zero = Learner(config(tiny)).adapter()
    return {n: (rng.normal(size=a.shape) * scale).astype(np.float32) if "lora_B" in n else a for n, a in zero.items()}


@pytest.fixture
def both(tiny: Path) -> Judge:
    judge = Judge(config(tiny, judges=["live", "frozen"]), DISTRIBUTION, "cpu")
    judge.load_version(3, moved_adapter(tiny))
    return judge


def test_the_frozen_judge_is_the_base_model_and_the_live_one_has_the_adapter(both: Judge, tiny: Path) -> None:
    one = group(trace(0, "2", 0.5), trace(1, "3", 0.5))
    live, frozen = (both.stats([one], [[0, 1]], who)[0] for who in ("live", "frozen"))
    learner = Learner(config(tiny))
    texts = [(one.prompt_ids, t.token_ids) for t in one.traces]
    for expected, found in zip(learner.logprobs(texts), frozen, strict=True):
        np.testing.assert_allclose(found.logprob, expected, atol=1e-4)
    learner.set_adapter(moved_adapter(tiny))
    for expected, found, other in zip(learner.logprobs(texts), live, frozen, strict=True):
        np.testing.assert_allclose(found.logprob, expected, atol=1e-4)
        assert np.abs(found.logprob - other.logprob).max() > 0.05
    assert (live[0].span, live[0].label, live[1].label) == ((2, 3), 0, 1)
    for values, again in zip(both.reference(one, [0, 1]), frozen, strict=True):  # after the live judge has read
        np.testing.assert_allclose(values, again.logprob, atol=1e-4)


def test_a_reward_is_the_head_on_what_predicts_the_last_token_with_the_reward_models_adapter(tiny: Path) -> None:
    """Against plain transformers, and the loss against the formula."""
    settings, moved = tiny_config(tiny, **REWARD), moved_adapter(tiny)
    model = add_adapter(load_model(settings.model, device="cpu"), settings.learner, seed=0, dtype=torch.float32).eval()
    load_adapter(model, moved)
    head = np.random.default_rng(2).normal(size=(1, model.config.hidden_size)).astype(np.float32)
    judge = Judge(settings, frozenset(), "cpu")
    judge.load_reward(moved | {HEAD_WEIGHT: head})
    one = group(trace(0, "2", 0.5), trace(1, "3", 0.5), trace(2, "4", 0.5, finished=False))

    @torch.no_grad()
    def by_hand() -> list[float]:
        texts = [torch.from_numpy(np.concatenate([one.prompt_ids, t.token_ids])).long()[None] for t in one.traces]
        states = [model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -2] for ids in texts]
        return [float(state @ torch.from_numpy(head[0])) for state in states]

    expected = by_hand()
    np.testing.assert_allclose(judge.rewards(one), [*expected[:2], np.nan], atol=1e-4)
    with model.disable_adapter():
        assert np.abs(np.subtract(by_hand(), expected)).max() > 0.01, "the adapter counts"

    add_reward_head(model)
    model.reward_head.weight.data[:] = torch.from_numpy(head)
    learned = replace(advantage_group(0, 2), pairs=(Pair(chosen=0, rejected=1, weight=0.5, margin=0.0),))
    with torch.no_grad():
        rewards = rewards_of(model, model.reward_head.weight[0], rows_of([learned]))[0].tolist()
        loss, sums = BradleyTerry()(model, [learned], StepSize(1, 0), 0)
    assert float(loss) == pytest.approx(0.5 * np.log1p(np.exp(rewards[1] - rewards[0])), rel=1e-5)
    assert sums["margin"] == pytest.approx(rewards[0] - rewards[1], rel=1e-5)


def test_a_version_that_it_does_not_hold_is_refused_by_name(both: Judge, tiny: Path) -> None:
    assert both.holds(3)
    assert both.holds(0)
    assert not both.holds(2)
    fresh = Judge(config(tiny), DISTRIBUTION, "cpu")
    with pytest.raises(EngineError, match=r"version 3 is not loaded \(versions held: \[\]\)"):
        fresh.stats([group(trace(0, "2", 0.5))], [[0]], "live")


def test_only_the_newest_versions_are_kept(tiny: Path) -> None:
    judge, adapter = Judge(config(tiny, cluster={"max_staleness": 1}), DISTRIBUTION, "cpu"), moved_adapter(tiny)
    for version in range(1, 6):
        judge.load_version(version, adapter)
    assert [version for version in range(1, 6) if judge.holds(version)] == [3, 4, 5]


def test_twins_are_read_once_and_long_groups_in_parts(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlsf_ray.engines import judge as module

    sizes: list[list[int]] = []
    real = module.read_distributions
    monkeypatch.setattr(
        module, "read_distributions", lambda m, rows: sizes.append([len(r.traces) for r in rows]) or real(m, rows)
    )
    traces = [trace(0, "2", 0.5), trace(1, "3", 0.5), trace(0, "2", 0.5), trace(2, "4", 0.5)]
    # a row of the prompt (3 tokens) with two traces (4 each) has 11 tokens, with three 15
    narrow = config(tiny, judges=["frozen"], learner={"max_tokens_per_pass": 12})
    found = Judge(narrow, DISTRIBUTION, "cpu").stats([group(*traces)], [[0, 1, 0, 2]], "frozen")[0]
    assert sizes == [[2], [1]]
    np.testing.assert_array_equal(found[0].distribution.entropy, found[2].distribution.entropy)
    wide = Judge(config(tiny, judges=["frozen"]), DISTRIBUTION, "cpu").stats(
        [group(*traces)], [[0, 1, 0, 2]], "frozen"
    )[0]
    for one, other in zip(found, wide, strict=True):
        np.testing.assert_allclose(np.stack(one.distribution), np.stack(other.distribution), atol=1e-4)


def test_p_true_is_the_share_of_true_between_the_two_words(tiny: Path) -> None:
    """Against the model's own next-token distributions after the question is asked."""
    made = config(tiny, judges=["frozen"])
    one = group(trace(0, "2", 0.5), trace(1, "3", 0.5), trace(2, None, 0.5))
    found = Judge(made, frozenset({"probe"}), "cpu").stats([one], [[0, 1, -1]], "frozen")[0]
    model, tokenizer = load_model(made.model, device="cpu"), load_tokenizer(made.model)

    def chance(answer: str, word: str) -> float:
        asked = type(one.prompt)(
            id="p", messages=(("user", "1 + 1 =" + P_TRUE.format(answer=answer)),), task="t", key="1 + 1"
        )
        before = encode_prompt(tokenizer, made.model, asked).tolist()
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logs = model(torch.tensor([before + ids])).logits[0].log_softmax(-1)
        return float(sum(logs[len(before) - 1 + i, token] for i, token in enumerate(ids)).exp())

    for answer, stats in (("2", found[0]), ("3", found[1])):
        yes, no = chance(answer, "True"), chance(answer, "False")
        assert stats.p_true == pytest.approx(yes / (yes + no), abs=1e-4)
    assert np.isnan(found[2].p_true)


@pytest.fixture
def side_by_side(tiny: Path) -> Iterator[Scorer]:
    made = Scorer(config(tiny, signal="self_certainty", judges=["frozen", "live"]))
    made.judge.load_version(3, moved_adapter(tiny))
    yield made
    made.close()


def test_the_first_judge_decides_and_the_second_is_kept_beside_it(side_by_side: Scorer) -> None:
    scored = side_by_side.score([group(trace(0, "2", 0.5), trace(1, "3", 0.5))])[0]
    assert scored.second_scores is not None
    assert scored.scores != scored.second_scores
    best = int(np.argmax(scored.scores))
    assert [(pair.chosen, pair.rejected) for pair in scored.pairs] == [(best, 1 - best)]


def test_what_the_generator_noted_is_not_read_again(tiny: Path) -> None:
    scorer = Scorer(config(tiny, signal="disparity"))
    scorer.score([group(trace(0, "2", 0.5), trace(1, "3", 0.7))])
    assert scorer.judge._model is None
    scorer.close()


def test_a_users_own_signal_may_ask_for_the_distribution(tiny: Path) -> None:
    scorer = Scorer(config(tiny, signal="own_parts:calm", judges=["frozen"]))
    one = group(trace(0, "2", 0.5), trace(1, "3", 0.5), trace(2, "3", 0.5, finished=False))
    scored = scorer.score([one])[0]
    seen = scorer.judge.stats([one], [[0, 1, 1]], "frozen")[0]
    assert scored.scores[:2] == tuple(pytest.approx(-float(s.distribution.entropy.max())) for s in seen[:2])
    assert np.isnan(scored.scores[2])
    scorer.close()
