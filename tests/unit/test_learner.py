"""One optimiser step is the textbook one, however it is cut into passes, parts and workers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_config

from rlsf_ray.engines.learner import Learner
from rlsf_ray.engines.models import load_model
from rlsf_ray.engines.steps import StepSize, pass_order, passes, split_group, surest, training_steps
from rlsf_ray.errors import NonFiniteLossError, WeightsError
from rlsf_ray.records import Pair, TrainingGroup, TrainingTrace


def group(index: int, *, num_pairs: int = 2, reference: float = -3.0) -> TrainingGroup:
    draw = np.random.default_rng(index)
    traces = tuple(
        TrainingTrace(
            id=f"{index}/{k}",
            seed=k,
            version=0,
            score=0.5,
            answer=None,
            token_ids=draw.integers(4, 300, 3 + k).astype(np.int32),
            logprob=np.full(3 + k, reference, dtype=np.float32),
            reference_logprob=np.full(3 + k, reference, dtype=np.float32),
        )
        for k in range(4)
    )
    pairs = [Pair(chosen=0, rejected=1), Pair(chosen=2, rejected=1, weight=0.5), Pair(chosen=3, rejected=0)]
    prompt = draw.integers(4, 300, 6).astype(np.int32)
    return TrainingGroup(
        id=f"r0/{index}",
        round=0,
        sequence=index,
        prompt_id=str(index),
        signal="disparity",
        prompt_ids=prompt,
        traces=traces,
        pairs=tuple(pairs[:num_pairs]),
    )


GROUPS = [group(0), group(1, num_pairs=3), group(2, num_pairs=1)]


def learner(tiny: Path, **changes: Any) -> Learner:
    made = Learner(tiny_config(tiny, **changes))
    generator = torch.Generator().manual_seed(3)
    for parameter in made._parameters:  # B is zero at first, which would hide the gradient of A
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return made


def gradients(made: Learner, groups: list[TrainingGroup], **kwargs: Any) -> torch.Tensor:
    total = sum(len(g.pairs) for g in GROUPS)
    made.train_step(groups, size=StepSize(total, 0), round=0, pass_index=0, **kwargs)
    return torch.cat([p.grad.flatten() for p in made._parameters if p.grad is not None])


def test_the_gradient_is_that_of_dpo_pair_by_pair(tiny: Path) -> None:
    """Against a plain computation: one forward pass for each trace of each pair, DPO plus 0.2 NLL, mean over pairs."""
    settings: dict[str, Any] = {"learner": {"max_grad_norm": 1e9}}
    ours = gradients(learner(tiny, **settings), GROUPS)
    plain = learner(tiny, **settings)
    loss = torch.zeros(())
    for one in GROUPS:
        for pair in one.pairs:
            chosen, rejected = one.traces[pair.chosen], one.traces[pair.rejected]
            margin = 0.1 * (
                (_sum_logprob(plain, one, chosen) - chosen.reference_logprob.sum())
                - (_sum_logprob(plain, one, rejected) - rejected.reference_logprob.sum())
            )
            nll = -_sum_logprob(plain, one, chosen) / len(chosen.token_ids)
            loss = loss + pair.weight * (-F.logsigmoid(margin) + 0.2 * nll)
    (loss / 6).backward()
    expected = torch.cat([p.grad.flatten() for p in plain._parameters if p.grad is not None])
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)
    assert expected.abs().max() > 1e-3


def _sum_logprob(made: Learner, one: TrainingGroup, trace: TrainingTrace) -> torch.Tensor:
    ids = torch.tensor(np.concatenate([one.prompt_ids, trace.token_ids])[None].astype(np.int64))
    logprob = made._model(input_ids=ids).logits[0].log_softmax(-1)[len(one.prompt_ids) - 1 : -1]
    return logprob.gather(1, ids[0, len(one.prompt_ids) :, None]).sum()


@pytest.mark.parametrize("max_tokens", [10, 30, 60])
def test_small_passes_give_the_same_gradient(tiny: Path, max_tokens: int) -> None:
    whole = gradients(learner(tiny), GROUPS)
    cut = gradients(learner(tiny, learner={"max_tokens_per_pass": max_tokens}), GROUPS)
    torch.testing.assert_close(cut, whole, atol=1e-6, rtol=1e-4)


def test_two_shares_summed_are_one_whole_step(tiny: Path) -> None:
    """What data-parallel workers do, in one process: each takes its groups, the sums are added."""
    whole = learner(tiny)
    expected = gradients(whole, GROUPS)
    first, second = learner(tiny), learner(tiny)
    kept: list[list[torch.Tensor]] = []
    gradients(first, GROUPS[:2], all_reduce=lambda tensors: kept.append([t.clone() for t in tensors]))
    calls = iter(kept)

    def add(tensors: list[torch.Tensor]) -> None:
        for tensor, other in zip(tensors, next(calls), strict=True):
            tensor += other

    torch.testing.assert_close(gradients(second, GROUPS[2:], all_reduce=add), expected, atol=1e-6, rtol=1e-4)
    for ours, theirs in zip(second._parameters, whole._parameters, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_a_worker_without_groups_takes_part(tiny: Path) -> None:
    made = learner(tiny)
    report = made.train_step([], size=StepSize(1, 0), round=0, pass_index=0, all_reduce=lambda tensors: None)
    assert report.grad_norm == 0.0


def test_the_gap_to_the_generator_is_a_root_mean_square_over_tokens_and_ranks(tiny: Path) -> None:
    """Log-probs of the trainer itself, shifted by 0.3 in one group and by 0.1 in the other."""
    made = learner(tiny)

    def shifted(one: TrainingGroup, by: float) -> TrainingGroup:
        own = made.logprobs([(one.prompt_ids, trace.token_ids) for trace in one.traces])
        return replace(
            one, traces=tuple(replace(t, logprob=values + by) for t, values in zip(one.traces, own, strict=True))
        )

    groups = [shifted(GROUPS[0], 0.3), shifted(GROUPS[1], -0.1)]
    tokens = [sum(len(trace.token_ids) for trace in one.traces) for one in groups]
    expected = ((tokens[0] * 0.09 + tokens[1] * 0.01) / sum(tokens)) ** 0.5
    calls: list[list[torch.Tensor]] = []

    def add(tensors: list[torch.Tensor]) -> None:
        if len(calls) < 2:
            calls.append([t.clone() for t in tensors])
        else:
            for tensor, other in zip(tensors, calls[len(calls) - 2], strict=True):
                tensor += other
            calls.append([])

    alone = learner(tiny).train_step(groups, size=StepSize(5, 0), round=0, pass_index=0)
    assert alone.logprob_gap == pytest.approx(expected, rel=1e-3)
    learner(tiny).train_step(groups[:1], size=StepSize(5, 0), round=0, pass_index=0, all_reduce=add)
    both = learner(tiny).train_step(groups[1:], size=StepSize(5, 0), round=0, pass_index=0, all_reduce=add)
    assert both.logprob_gap == pytest.approx(expected, rel=1e-3)
    assert "gap" not in " ".join(both.means())


def test_training_prefers_the_chosen_traces(tiny: Path) -> None:
    made = learner(tiny, loss={"nll": 0.0})
    reports = [made.train_step(GROUPS, size=StepSize(6, 0), round=0, pass_index=p) for p in range(12)]
    assert reports[-1].means()["loss"] < reports[0].means()["loss"]
    assert reports[-1].means()["margin"] > reports[0].means()["margin"] + 0.1


def test_warm_up_then_constant(tiny: Path) -> None:
    made = learner(tiny, learner={"warmup_steps": 4, "learning_rate": 1e-3})
    rates = [made.train_step(GROUPS[:1], size=StepSize(2, 0), round=0, pass_index=0).learning_rate for _ in range(6)]
    np.testing.assert_allclose(rates, [0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])


def test_a_non_finite_loss_is_typed_names_the_batch_and_leaves_the_weights(tiny: Path) -> None:
    made = learner(tiny)
    before = made.adapter()
    with pytest.raises(NonFiniteLossError, match=r"r0/7"):
        made.train_step([group(7, reference=float("nan"))], size=StepSize(2, 0), round=0, pass_index=0)
    for name, array in made.adapter().items():
        np.testing.assert_array_equal(array, before[name])


def test_saved_state_goes_on_exactly(tiny: Path) -> None:
    straight = learner(tiny)
    gradients(straight, GROUPS)
    state = straight.state_bytes()
    gradients(straight, GROUPS)
    resumed = Learner(tiny_config(tiny))
    resumed.load_state_bytes(state)
    gradients(resumed, GROUPS)
    for name, array in straight.adapter().items():
        np.testing.assert_array_equal(array, resumed.adapter()[name])
    with pytest.raises(WeightsError, match="lora_rank"):
        Learner(tiny_config(tiny, learner={"lora_rank": 8})).load_state_bytes(state)


def test_the_initial_adapter_depends_on_the_seed_alone(tiny: Path) -> None:
    torch.manual_seed(1)
    first = Learner(tiny_config(tiny)).adapter()
    torch.manual_seed(2)
    second = Learner(tiny_config(tiny)).adapter()
    other = Learner(tiny_config(tiny, seed=5)).adapter()
    assert all((first[name] == second[name]).all() for name in first)
    assert any((first[name] != other[name]).any() for name in first)
    assert all((first[name] == 0).all() for name in first if "lora_B" in name)


def test_only_the_adapter_learns(tiny: Path) -> None:
    made = Learner(tiny_config(tiny))
    base = load_model(tiny_config(tiny).model)
    gradients(made, GROUPS)
    held = {n.replace(".base_layer", ""): p for n, p in made._model.get_base_model().named_parameters()}
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, held[name])


def test_steps_close_at_the_number_of_pairs_and_the_rest_is_flushed() -> None:
    steps = list(training_steps(iter(GROUPS), 4))
    assert [[g.sequence for g in step] for step in steps] == [[0, 1], [2]]  # 2 + 3 >= 4, then 1


def test_passes_respect_the_budget_with_padding() -> None:
    sizes = [[g.num_tokens for g in batch] for batch in passes(GROUPS, 60)]
    assert all(len(batch) * max(batch) <= 60 for batch in sizes)
    assert sorted(n for batch in sizes for n in batch) == sorted(g.num_tokens for g in GROUPS)


def test_split_parts_hold_each_pair_once_and_only_used_traces() -> None:
    one = group(1, num_pairs=3)  # 6 prompt tokens, traces of 3, 4, 5, 6 tokens
    parts = split_group(one, 15)
    names = [(p.traces[q.chosen].id, p.traces[q.rejected].id) for p in parts for q in p.pairs]
    assert names == [("1/0", "1/1"), ("1/2", "1/1"), ("1/3", "1/0")]
    assert [p.num_tokens for p in parts] == [13, 15, 15]
    assert split_group(one, 24) == [one]


def test_later_passes_are_shuffled_the_same_way_each_time() -> None:
    many = [replace(group(i), sequence=i) for i in range(8)]
    order = [[g.sequence for g in pass_order(many[::-1], 0, 0, p)] for p in range(3)]
    assert order[0] == list(range(8))
    assert order[1] != order[0] != order[2] != order[1]
    assert order[1] == [g.sequence for g in pass_order(many, 0, 0, 1)]


def test_the_surest_groups_are_kept_in_their_order_and_the_earlier_of_equals() -> None:
    groups = [replace(group(index), sure=sure) for index, sure in enumerate((2.0, 3.0, 2.0, 5.0))]
    kept, left_out = surest(iter(groups), 3)
    assert [one.sequence for one in kept] == [0, 1, 3]
    assert [one.sequence for one in left_out] == [2]
    assert surest(groups, None) == (groups, [])
    assert surest(groups, 9) == (groups, [])
