"""Scoring a group: signal, answer classes, pairs; then reference log-probs of the base model for traces in use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from advantage_runs import REWARD
from group_data import group, trace
from tiny import tiny_config

from rlsf_ray.engines.models import load_model
from rlsf_ray.engines.scorer import Scorer, outcome
from rlsf_ray.errors import InputError
from rlsf_ray.records import Trace, Turn


@pytest.fixture
def scorer(tiny: Path) -> Iterator[Scorer]:
    made = Scorer(tiny_config(tiny, pairs={"rule": "voted", "max_pairs": 3, "min_chosen": 0.5}))
    yield made
    made.close()


def test_the_vote_is_weighted_by_disparity_and_equal_numbers_are_one_answer(scorer: Scorer) -> None:
    """ "2" and "2.0" are one answer with weight 0.4 + 0.3 = 0.7; "3" has 0.6 alone and loses.

    Chosen: traces 0 then 1; rejected: the unanswered trace 3 (absent, lowest) then trace 2.
    """
    traces = [trace(0, "2", 0.5), trace(1, "2.0", 0.4), trace(2, "3", 0.7), trace(3, None, 0.9)]
    scored = scorer.score([group(*traces)])[0]
    assert scored.labels == (0, 0, 1, -1)
    np.testing.assert_allclose(scored.scores, [0.4, 0.3, 0.6, np.nan], rtol=1e-6)
    assert [(pair.chosen, pair.rejected) for pair in scored.pairs] == [(0, 3), (1, 2)]
    assert scored.pairs[1].margin == pytest.approx(0.3 - 0.6)
    assert scored.reason is None


def test_a_filtered_group_says_why(scorer: Scorer) -> None:
    scored = scorer.score([group(trace(0, "2", 0.9), trace(1, "2", 0.8))])[0]
    assert scored.pairs == ()
    assert scored.reason == "one_answer"
    ended = outcome(scored)
    assert (ended.num_traces, ended.num_tokens, ended.num_parsed, ended.num_examples) == (2, 8, 2, 0)
    assert scorer.training_groups([scored]) == []


def test_a_trace_that_was_cut_off_is_never_chosen_and_counted(scorer: Scorer) -> None:
    scored = scorer.score([group(trace(0, None, 0.9, finished=False), trace(1, "3", 0.8), trace(2, "4", 0.3))])[0]
    assert [(pair.chosen, pair.rejected) for pair in scored.pairs] == [(1, 0)]
    assert outcome(scored).num_cut_off == 1


def test_reference_logprobs_are_the_frozen_base_models(scorer: Scorer, tiny: Path) -> None:
    traces = [trace(0, "2", 0.9), trace(1, "5", 0.2), trace(2, "6", 0.4)]
    training = scorer.training_groups(scorer.score([group(*traces)]))[0]
    assert [t.id for t in training.traces] == ["r0/p/0", "r0/p/1"], "trace 2 stands in no pair"
    assert [(p.chosen, p.rejected) for p in training.pairs] == [(0, 1)]
    model = load_model(tiny_config(tiny).model)
    for one in training.traces:
        ids = torch.tensor(np.concatenate([[5, 6, 7], one.token_ids])[None].astype(np.int64))
        with torch.no_grad():
            rows = model(input_ids=ids).logits[0, 2:-1].log_softmax(-1)
        expected = rows.gather(1, ids[0, 3:, None])[:, 0].numpy()
        np.testing.assert_allclose(one.reference_logprob, expected, atol=2e-5)
    assert training.traces[0].version == 3
    assert training.traces[0].answer == "2"


def test_random_pairs_repeat_for_the_same_run_seed(tiny: Path) -> None:
    one = group(*(trace(k, str(k), 0.2 * k + 0.1) for k in range(4)))

    def pairs(seed: int) -> list[tuple[int, int]]:
        scorer = Scorer(tiny_config(tiny, seed=seed, pairs={"rule": "random", "max_pairs": 1}))
        found = [(pair.chosen, pair.rejected) for pair in scorer.score([one])[0].pairs]
        scorer.close()
        return found

    assert pairs(0) == pairs(0)
    assert len({tuple(pairs(seed)) for seed in range(8)}) > 2


def test_a_reward_model_learns_from_traces_that_have_a_score(tiny: Path) -> None:
    """DPO may reject a trace without an answer; a reward model would only learn what an answer looks like."""
    one = group(trace(0, "2", 0.9), trace(1, None, 0.9), trace(2, "5", 0.2, finished=False), trace(3, "7", 0.3))
    rewarded = REWARD | {"pairs": {"rule": "all_above", "max_pairs": 9, "same_answer": False}}
    rejected = {}
    for name, settings in (("dpo", {"pairs": rewarded["pairs"]}), ("reward", rewarded)):
        scorer = Scorer(tiny_config(tiny, **settings))
        scored = scorer.score([one])[0]
        rejected[name] = {one.traces[pair.rejected].index for pair in scored.pairs if pair.chosen == 0}
        scorer.close()
    assert rejected == {"dpo": {1, 2, 3}, "reward": {3}}


def test_a_users_own_signal_is_found_by_its_path(tiny: Path) -> None:
    scorer = Scorer(tiny_config(tiny, signal="own_parts:token_count", pairs={"rule": "best_worst"}))
    scored = scorer.score([group(trace(0, "2", 0.9), trace(1, "5", 0.2))])[0]
    assert scored.scores == (4.0, 4.0)
    scorer.close()


def test_a_users_own_signal_that_is_missing_is_an_input_error(tiny: Path) -> None:
    with pytest.raises(InputError, match="signal='own_parts:nothing' cannot be imported"):
        Scorer(tiny_config(tiny, signal="own_parts:nothing"))


def test_a_trace_whose_check_could_not_be_made_is_not_learned_against(tiny: Path) -> None:
    """Three tries: one passes, one fails, one was never checked. Of the last nothing is said."""

    def tried(index: int, passed: float) -> Trace:
        one = trace(index, str(index), 0.5)
        turn = Turn(role="attempt", tokens=(0, len(one.token_ids)), text=one.text, answer=str(index), passed=passed)
        return replace(one, turns=(turn,))

    pairs = {"rule": "all_above", "min_chosen": 1.0, "same_answer": True}
    made = Scorer(tiny_config(tiny, signal="passed", rollout={"name": "second_try"}, pairs=pairs))
    scored, unknown = made.score(
        [group(tried(0, np.nan), tried(1, 1.0), tried(2, 0.0)), group(tried(0, np.nan), tried(1, np.nan))]
    )
    made.close()
    assert [(pair.chosen, pair.rejected) for pair in scored.pairs] == [(1, 2)]
    assert unknown.reason == "check_failed"
