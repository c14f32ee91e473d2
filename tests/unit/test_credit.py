"""Credit on the right tokens: what the loss of a rollout of several turns depends on, told from its gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from group_data import advantage_group
from tiny import tiny_config

from rlsf_ray.engines import objectives
from rlsf_ray.engines.lora import add_adapter
from rlsf_ray.engines.models import load_model
from rlsf_ray.engines.objectives import objective_of
from rlsf_ray.engines.scorer import Scorer
from rlsf_ray.engines.steps import StepSize
from rlsf_ray.engines.transformers_engine import TransformersEngine
from rlsf_ray.records import Check, Pair, Prompt, TrainingGroup, Turn
from rlsf_ray.report_turns import credit_by_advantage, credit_of_pairs
from rlsf_ray.rollouts.programs import write_groups
from rlsf_ray.tables import trace_rows


def scored(tiny: Path, **advantages: Any) -> tuple[Any, Any, TrainingGroup]:
    """(config, group, what is learned from it): three reflections on a failed attempt, one of which helped."""
    config = tiny_config(
        tiny,
        signal="passed",
        rollout={"name": "reflect_retry", "traces": 3, "max_tokens": 12},
        advantages={"turns": ["reflection"], **advantages},
    )
    engine = TransformersEngine(config.model, config.learner, threads=1)
    check = Check(kind="countdown", data={"numbers": [1], "target": 1000})
    prompt = Prompt(id="p", messages=(("user", "2 + 3 ="),), task="t", key="2+3", check=check)
    (group,) = write_groups(engine, [prompt], config=config, round=0, first_sequence=0, version=0)
    lucky = group.traces[1]
    object.__setattr__(lucky, "turns", (*lucky.turns[:2], _passing(lucky.turns[2])))
    scorer = Scorer(config, threads=1)
    (found,) = scorer.score([group])
    (training,) = scorer.training_groups([found])
    return config, group, training


def _passing(turn: Turn) -> Turn:
    return Turn(role=turn.role, tokens=turn.tokens, text=turn.text, answer=turn.answer, passed=1.0)


def test_only_reflections_are_credited_and_by_what_came_of_them(tiny: Path) -> None:
    _, group, training = scored(tiny)
    for trace, learned, sign in zip(group.traces, training.traces, (-1, 1, -1), strict=True):
        begin, end = trace.turns[1].tokens
        assert learned.credit is not None
        assert (np.sign(learned.credit[begin:end]) == sign).all()
        assert learned.learned.sum() == end - begin


def test_every_other_token_gets_no_gradient(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, group, training = scored(tiny)
    read: list[torch.Tensor] = []

    def watched(*args: Any, **more: Any) -> Any:
        rows, entropy = original(*args, **more)
        read.extend(trace for row in rows for trace in row)
        for values in read:
            values.retain_grad()
        return rows, entropy

    original = objectives.trace_logprobs_and_entropies
    monkeypatch.setattr(objectives, "trace_logprobs_and_entropies", watched)
    model = add_adapter(load_model(config.model, device=None), config.learner, seed=0, dtype=torch.float32)
    loss, _ = objective_of(config)(model, [training], StepSize.of([training]), 0)
    loss.backward()
    for trace, values in zip(group.traces, read, strict=True):
        begin, end = trace.turns[1].tokens
        assert values.grad is not None
        assert (values.grad[begin:end] != 0).all()
        assert (values.grad[:begin] == 0).all()
        assert (values.grad[end:] == 0).all()


def test_the_gradient_is_that_of_the_reflections_read_plainly(tiny: Path) -> None:
    """Against a loss written out by hand, on whole texts one by one, without masks, packing or records."""
    config, group, training = scored(tiny)
    grads = []
    for plain in (False, True):
        model = add_adapter(load_model(config.model, device=None), config.learner, seed=0, dtype=torch.float32)
        with torch.no_grad():  # at the start B is 0, and then A would have no gradient
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.add_(0.01)
        if plain:
            loss = torch.zeros(())
            for trace, learned in zip(group.traces, training.traces, strict=True):
                ids = torch.tensor(np.concatenate([group.prompt_ids, trace.token_ids])[None], dtype=torch.long)
                logs = model(input_ids=ids).logits[0].float().log_softmax(-1)
                begin, end = (len(group.prompt_ids) + at for at in trace.turns[1].tokens)
                found = logs[torch.arange(begin - 1, end - 1), ids[0, begin:end]]
                written = torch.from_numpy(trace.logprob[slice(*trace.turns[1].tokens)])
                advantage = float(learned.credit[trace.turns[1].tokens[0]])  # type: ignore[index]
                ratio = (found - written).exp()
                clipped = ratio.clamp(0.8, 1.2)
                loss = loss - torch.minimum(ratio * advantage, clipped * advantage).mean()
        else:
            loss, _ = objective_of(config)(model, [training], StepSize.of([training]), 0)
        loss.backward()
        grads.append({name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None})
    ours, theirs = grads
    assert ours.keys() == theirs.keys()
    assert max(float(grad.abs().max()) for grad in theirs.values()) > 1e-3
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-6)


def test_held_turns_feel_the_penalty_and_no_advantage(tiny: Path) -> None:
    _, group, training = scored(tiny, held_turns=["attempt"], kl=0.1)
    for trace, learned in zip(group.traces, training.traces, strict=True):
        assert learned.credit is not None
        assert (learned.credit[slice(*trace.turns[0].tokens)] == 0.0).all()
        assert np.isnan(learned.credit[slice(*trace.turns[2].tokens)]).all()


def test_traces_without_a_credited_turn_take_no_part(tiny: Path) -> None:
    config = tiny_config(
        tiny, signal="passed", rollout={"name": "reflect_retry", "traces": 3}, advantages={"turns": ["critique"]}
    )
    _, group, _ = scored(tiny)
    (found,) = Scorer(config, threads=1).score([group])
    assert found.reason == "too_few_scores"


def test_an_example_is_named_by_its_pair_of_traces_or_by_its_only_one() -> None:
    group = advantage_group(7, 3)
    assert group.example_ids == ["7/0", "7/1", "7/2"]
    pairs = (Pair(chosen=2, rejected=0), Pair(chosen=2, rejected=1))
    assert replace(group, pairs=pairs).example_ids == ["7/2 > 7/0", "7/2 > 7/1"]


def test_the_report_shows_the_credit_that_the_trainer_sees(tiny: Path) -> None:
    config, group, training = scored(tiny, held_turns=["attempt"], kl=0.1)
    (found,) = Scorer(config, threads=1).score([group])
    assert config.advantages is not None
    for row, learned in zip(trace_rows(found), training.traces, strict=True):
        np.testing.assert_array_equal(credit_by_advantage(row, config.advantages), learned.credit)


def test_what_both_sides_of_a_pair_begin_with_counts_nothing() -> None:
    """Two attempts alike (1 2), 9 is said, then 3 4 against 3 5 6: they part at 4 and 5. A third is in no pair."""
    rows = [
        {"trace_id": name, "token_ids": [1, 2, 9, *rest], "turns": [{"tokens": [0, 2]}, {"tokens": [3, 3 + len(rest)]}]}
        for name, rest in (("a", [3, 4]), ("b", [3, 5, 6]), ("c", [7]))
    ]
    pairs = [{"chosen_trace_id": "a", "rejected_trace_id": "b", "weight": 0.5}]
    chosen, rejected, other = credit_of_pairs(rows, pairs)
    np.testing.assert_array_equal(chosen, [0, 0, np.nan, 0, 0.5])
    np.testing.assert_array_equal(rejected, [0, 0, np.nan, 0, -0.5, -0.5])
    assert np.isnan(other).all()
