"""The policy-gradient loss: by hand, against TRL's GRPO, and through the learner."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from group_data import advantage_group
from learner_sides import grpo_inputs
from tiny import tiny_config

from rlsf_ray.algorithms.losses import importance_weights, kl_penalty, policy_gradient
from rlsf_ray.config_sections import AdvantagesConfig, RolloutConfig
from rlsf_ray.engines.learner import Learner
from rlsf_ray.engines.models import load_model
from rlsf_ray.engines.objectives import PolicyGradient
from rlsf_ray.engines.packing import trace_logprobs
from rlsf_ray.engines.steps import StepSize, passes, split_group

LN = np.log


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "moves"),
    [
        (1.0, 2.0, -2.0, True),
        (1.25, 2.0, -2.5, True),
        (1.5, 2.0, -2.0 * 1.3, False),  # above 1 + clip_high, and good: no more pull
        (1.5, -2.0, 3.0, True),  # bad and likelier: the pull back stays
        (0.5, -2.0, 2.0 * 0.8, False),  # below 1 - clip, and bad: no more push
        (0.5, 2.0, -1.0, True),
    ],
)
def test_the_clip_is_one_sided_by_the_sign_of_the_advantage(
    ratio: float, advantage: float, expected: float, moves: bool
) -> None:
    policy = torch.tensor([-1.0 + LN(ratio)], dtype=torch.float64, requires_grad=True)
    old, advantages = torch.tensor([-1.0], dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    loss = policy_gradient(policy, old, advantages, clip=0.2, clip_high=0.3)
    loss.sum().backward()
    assert loss.item() == pytest.approx(expected)
    assert bool(policy.grad.abs() > 0) is moves


def test_a_token_without_an_advantage_costs_nothing_however_far_the_policies_are_apart() -> None:
    old, none = torch.tensor([-120.0]), torch.tensor([0.0])
    assert policy_gradient(torch.tensor([0.0]), old, none, clip=0.2, clip_high=0.2).item() == 0.0


def test_kl_estimators_by_hand_and_in_expectation() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    k1, k2, k3 = (kl_penalty(p.log(), q.log(), name) for name in ("k1", "k2", "k3"))
    gap = LN(0.2 / 0.5)  # reference - policy of the first token
    assert [k1[0].item(), k2[0].item(), k3[0].item()] == pytest.approx([-gap, gap**2 / 2, 0.4 - 1 - gap])
    true = (p * (p / q).log()).sum().item()
    assert (p * k1).sum().item() == pytest.approx(true)  # unbiased
    assert (p * k3).sum().item() == pytest.approx(true)
    assert (k3 >= 0).all()


def test_gradients_of_the_kl_estimators() -> None:
    """Over the policy's own draws: k2 has the gradient of the true KL, k1 none at all."""
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    p = logits.softmax(0)
    (true,) = torch.autograd.grad((p * (p / q).log()).sum(), logits, retain_graph=True)
    found = {
        name: torch.autograd.grad(
            (p.detach() * kl_penalty(logits.log_softmax(0), q.log(), name)).sum(), logits, retain_graph=True
        )[0]
        for name in ("k1", "k2")
    }
    torch.testing.assert_close(found["k2"], true)
    torch.testing.assert_close(found["k1"], torch.zeros(3, dtype=torch.float64))


def test_importance_weights_are_cut_at_the_top_only_and_pass_no_gradient() -> None:
    policy = torch.tensor([0.0, 0.0, 0.0], requires_grad=True)
    weights = importance_weights(policy, torch.log(torch.tensor([0.1, 1.0, 4.0])), most=2.0)
    torch.testing.assert_close(weights, torch.tensor([2.0, 1.0, 0.25]))
    assert not weights.requires_grad


# --- TRL as the oracle ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(tiny: Path) -> Any:
    """A model that has moved away from its reference, all of whose weights train but the head."""
    model = load_model(tiny_config(tiny).model, device="cpu").requires_grad_(True)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.get_output_embeddings().weight.requires_grad_(False)
    return model


def moved(policy: Any, temperature: float = 1.0) -> list[Any]:
    """Groups whose `logprob` (the generator's) and `reference_logprob` lie near the policy's, as after a few steps."""
    draw, groups = np.random.default_rng(3), [advantage_group(0, 3), advantage_group(1, 4)]
    with torch.no_grad():
        read = trace_logprobs(policy, [_row(group) for group in groups], temperature)
    made = []
    for group, values in zip(groups, read, strict=True):
        near = [
            replace(
                trace,
                logprob=(own.numpy() + draw.normal(0, 0.3, len(own))).astype(np.float32),
                reference_logprob=(own.numpy() + draw.normal(0, 0.5, len(own))).astype(np.float32),
            )
            for trace, own in zip(group.traces, values, strict=True)
        ]
        made.append(replace(group, traces=tuple(near)))
    return made


def _row(group: Any) -> Any:
    from rlsf_ray.engines.objectives import rows_of

    return rows_of([group])[0]


def trl_loss(policy: Any, groups: list[Any], folder: Path, temperature: float, **settings: Any) -> torch.Tensor:
    """GRPOTrainer's own loss of the same traces."""
    from datasets import Dataset
    from tiny import tiny_tokenizer
    from trl import GRPOConfig, GRPOTrainer

    arguments = GRPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=7,
        num_generations=7, epsilon=0.2, epsilon_high=0.28, gradient_checkpointing=False, max_completion_length=16,
        temperature=temperature, use_bias_correction_kl=False, **settings,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["1 + 1 ="]}),
        processing_class=tiny_tokenizer(),
    )
    trainer.model.eval()
    pairs = [(group.prompt_ids, trace) for group in groups for trace in group.traces]
    return trainer._compute_loss(policy, grpo_inputs(pairs))


@pytest.mark.parametrize(("normalise", "theirs"), [("trace", "grpo"), ("token", "bnpo"), ("constant", "dr_grpo")])
@pytest.mark.parametrize(("kl", "temperature"), [(0.0, 1.0), (0.1, 1.0), (0.1, 0.7)])
@pytest.mark.filterwarnings("ignore::UserWarning")  # TRL wants another vLLM, which is not in play here
def test_loss_and_gradient_equal_those_of_trl(
    policy: Any, tmp_path: Path, normalise: str, theirs: str, kl: float, temperature: float
) -> None:
    groups = moved(policy, temperature)
    policy.eval().zero_grad()
    expected = trl_loss(policy, groups, tmp_path, temperature, loss_type=theirs, beta=kl)
    expected.backward()
    gradient = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    settings = AdvantagesConfig(normalise=normalise, clip=0.2, clip_high=0.28, kl=kl, kl_estimator="k3")
    size = StepSize.of(groups)
    loss, sums = PolicyGradient(settings, RolloutConfig(max_tokens=16, temperature=temperature))(
        policy, groups, size, 0
    )
    (loss / size.examples).backward()
    torch.testing.assert_close(loss / size.examples, expected)
    assert sums["clipped"] > 0  # some tokens are clipped, so the clip is compared too
    assert len(gradient) > 10
    for name, parameter in policy.named_parameters():
        if name in gradient:
            torch.testing.assert_close(parameter.grad, gradient[name], rtol=1e-3, atol=1e-6)


# --- through the learner --------------------------------------------------------------------------------------------


def learner(tiny: Path, **settings: Any) -> Learner:
    advantages = {"traces_per_step": 7, "clip": 0.2} | settings
    return Learner(
        tiny_config(
            tiny,
            advantages=advantages,
            rollout={"temperature": 1.0},
            learner={"learning_rate": 1e-3, "warmup_steps": 0},
        )
    )


def gradients(made: Learner, groups: list[Any], **kwargs: Any) -> list[torch.Tensor]:
    made._optimizer.step = lambda: None  # type: ignore[method-assign]
    made.train_step(groups, size=StepSize.of(groups), round=0, pass_index=0, **kwargs)
    return [p.grad.clone() for p in made._parameters]


@pytest.mark.parametrize("normalise", ["trace", "token", "constant"])
def test_a_step_in_many_passes_has_the_gradient_of_one(tiny: Path, normalise: str) -> None:
    groups = [advantage_group(0, 3), advantage_group(1, 4)]
    whole = gradients(learner(tiny, normalise=normalise, kl=0.1, entropy_bonus=0.01), groups)
    cut = learner(tiny, normalise=normalise, kl=0.1, entropy_bonus=0.01)
    cut._config = cut._config.model_copy(
        update={"learner": cut._config.learner.model_copy(update={"max_tokens_per_pass": 12})}
    )
    assert len(list(passes(groups, 12))) > 4
    for one, other in zip(whole, gradients(cut, groups), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7)


def test_a_group_is_split_by_its_traces(tiny: Path) -> None:
    group = advantage_group(1, 4)
    parts = split_group(group, 12)
    assert [trace.id for part in parts for trace in part.traces] == [trace.id for trace in group.traces]
    assert len(parts) > 1


def test_good_traces_become_likelier_and_bad_ones_less_so(tiny: Path) -> None:
    made, groups = learner(tiny), [advantage_group(0, 3), advantage_group(1, 4)]
    texts = [(group.prompt_ids, trace.token_ids) for group in groups for trace in group.traces]
    before = made.logprobs(texts)
    for _ in range(20):
        groups = [_as_now(made, group) for group in groups]
        made.train_step(groups, size=StepSize.of(groups), round=0, pass_index=0)
    gains = [(now - then).mean() for now, then in zip(made.logprobs(texts), before, strict=True)]
    advantages = [float(trace.credit[0]) for group in groups for trace in group.traces]
    assert np.corrcoef(gains, advantages)[0, 1] > 0.5


def _as_now(made: Learner, group: Any) -> Any:
    found = made.logprobs([(group.prompt_ids, trace.token_ids) for trace in group.traces])
    return replace(group, traces=tuple(replace(t, logprob=v) for t, v in zip(group.traces, found, strict=True)))


def test_stale_traces_are_weighed_and_not_clipped(tiny: Path) -> None:
    """One token 1.5 times likelier now than when it was written, with a positive advantage: beyond the clip of 0.2."""
    made = learner(tiny, max_weight=1.2)
    group = _as_now(made, advantage_group(0, 3))
    older = replace(group, traces=tuple(replace(t, logprob=t.logprob - np.float32(LN(1.5))) for t in group.traces))
    reports = {
        newest: copy.deepcopy(made).train_step([older], size=StepSize.of([older]), round=0, pass_index=0, newest=newest)
        for newest in (0, 1)  # the traces are of version 0: fresh, stale
    }
    good = sum(trace.credit[0] > 0 for trace in group.traces) / len(group.traces)
    assert reports[0].means()["clipped"] == pytest.approx(good, abs=1e-5)
    assert reports[0].means()["weight"] == pytest.approx(1.0)
    assert reports[1].means()["clipped"] == 0.0
    assert reports[1].means()["weight"] == pytest.approx(1.2, abs=1e-5)  # exp(ln 1.5), cut at 1.2


def test_the_weight_of_a_stale_trace_counts_in_its_gradient(tiny: Path) -> None:
    """Under the cut it is the ratio itself: 1.5 times the gradient of a trace that was written just now."""
    made = learner(tiny)
    made._config = made._config.model_copy(
        update={"learner": made._config.learner.model_copy(update={"max_grad_norm": 1e6})}
    )
    group = _as_now(made, advantage_group(0, 3))
    older = replace(group, traces=tuple(replace(t, logprob=t.logprob - np.float32(LN(1.5))) for t in group.traces))
    now = gradients(copy.deepcopy(made), [group], newest=0)
    assert max(gradient.abs().max() for gradient in now) > 1e-3
    for most, times in ((1.2, 1.2), (2.0, 1.5)):
        made._objective._settings = made._objective._settings.model_copy(update={"max_weight": most})
        for stale, fresh in zip(gradients(copy.deepcopy(made), [older], newest=1), now, strict=True):
            torch.testing.assert_close(stale, times * fresh, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_estimator_of_the_kl_that_is_asked_for_is_the_one_in_the_loss(tiny: Path, estimator: Any) -> None:
    made, group = learner(tiny, kl=1.0, kl_estimator=estimator), advantage_group(0, 3)
    now = _as_now(made, group)
    policy, reference = (
        torch.cat([torch.from_numpy(getattr(t, name)[t.learned]) for t in now.traces])
        for name in ("logprob", "reference_logprob")
    )
    traces = torch.from_numpy(np.repeat(range(len(now.traces)), [t.learned.sum() for t in now.traces]))
    tokens = kl_penalty(policy, reference, estimator)
    expected = np.mean([float(tokens[traces == k].mean()) for k in range(len(now.traces))])
    report = made.train_step([now], size=StepSize.of([now]), round=0, pass_index=0)
    assert report.means()["kl"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert report.means()["loss"] == pytest.approx(expected - np.mean([t.credit[0] for t in now.traces]), abs=1e-4)


def test_a_token_far_from_the_reference_does_not_make_the_penalty_infinite() -> None:
    assert torch.isfinite(kl_penalty(torch.tensor([-95.0]), torch.tensor([-1.0]), "k3")).all()


def test_the_entropy_bonus_raises_the_entropy(tiny: Path) -> None:
    def entropy_after(bonus: float) -> float:
        made, group = learner(tiny, entropy_bonus=bonus), advantage_group(0, 3)
        for _ in range(6):
            now = _as_now(made, group)
            report = made.train_step([now], size=StepSize.of([now]), round=0, pass_index=0)
        return report.means()["entropy"]

    assert entropy_after(1.0) > entropy_after(0.0) + 0.01
