"""Pair losses against numbers worked out by hand, TRL's own loss, and finite differences."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlsf_ray.algorithms.losses import dpo, ipo, pair_loss

BETA = 0.3


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def indices(*values: int) -> Tensor:
    return torch.tensor(values)


def test_dpo_by_hand() -> None:
    # margin = 0.3 * ((-1 - -3) - (-4 - -5)) = 0.3; loss = ln(1 + e^-0.3)
    args = (vector(-1.0), vector(-4.0), vector(-3.0), vector(-5.0))
    clean, swapped = math.log(1 + math.exp(-0.3)), math.log(1 + math.exp(0.3))
    assert dpo(*args, beta=BETA).item() == pytest.approx(clean)
    assert dpo(*args, beta=BETA, label_smoothing=0.1).item() == pytest.approx(0.9 * clean + 0.1 * swapped)


def test_ipo_by_hand() -> None:
    # gap 1, target 1 / (2 * 0.25) = 2: (1 - 2)^2
    assert ipo(vector(-1.0), vector(-4.0), vector(-3.0), vector(-5.0), beta=0.25).item() == pytest.approx(1.0)


def group() -> dict[str, Any]:
    """Three traces, of 2, 4 and 5 tokens, in the pairs (0, 1), (0, 2), (2, 1)."""
    return {
        "trace_logprob_K": vector(-2.0, -3.0, -5.0),
        "reference_logprob_K": vector(-2.5, -2.0, -4.5),
        "lengths_K": indices(2, 4, 5),
        "chosen_N": indices(0, 0, 2),
        "rejected_N": indices(1, 2, 1),
        "weights_N": vector(1.0, 0.5, 2.0),
    }


def test_pair_loss_weights_each_pair_with_its_anchor_and_sums_the_rest_unweighted() -> None:
    loss, sums = pair_loss("dpo", **group(), beta=BETA, label_smoothing=0.0, nll=0.2)
    # log-ratios 0.5, -1.0, -0.5; margins 0.3 * (1.5, 1.0, 0.5); mean token NLL of the chosen 1, 1, 1
    pairs = [math.log(1 + math.exp(-0.3 * gap)) + 0.2 for gap in (1.5, 1.0, 0.5)]
    expected = pairs[0] + 0.5 * pairs[1] + 2.0 * pairs[2]
    assert loss.item() == pytest.approx(expected)
    assert sums == pytest.approx(
        {"loss": expected, "margin": 0.9, "accuracy": 3, "chosen_reward": 0.15, "rejected_reward": -0.75, "nll": 3.0}
    )


def test_pair_loss_of_ipo_takes_the_mean_token_log_prob() -> None:
    loss, _ = pair_loss("ipo", **group(), beta=0.25, label_smoothing=0.0, nll=0.0)
    # mean log-ratios 0.25, -0.25, -0.1; gaps 0.5, 0.35, 0.15; target 2
    assert loss.item() == pytest.approx(1.5**2 + 0.5 * 1.65**2 + 2.0 * 1.85**2)


def test_accuracy_does_not_count_a_margin_of_zero_or_less() -> None:
    case = group() | {"reference_logprob_K": vector(-2.0, -3.0, -5.5)}  # log-ratios 0, 0, 0.5
    _, sums = pair_loss("dpo", **case, beta=BETA, label_smoothing=0.0, nll=0.0)
    assert sums["accuracy"] == 1  # pair (2, 1) only


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_gradient_equals_finite_differences(name: str) -> None:
    case = group()
    logprobs = case.pop("trace_logprob_K").requires_grad_()
    smoothing = 0.1 if name == "dpo" else 0.0

    def loss(values: Tensor) -> Tensor:
        return pair_loss(name, values, **case, beta=BETA, label_smoothing=smoothing, nll=0.2)[0]

    assert torch.autograd.gradcheck(loss, logprobs)


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_a_pair_of_zero_weight_gives_no_gradient(name: str) -> None:
    case = group() | {"weights_N": vector(0.0, 1.0, 0.0)}
    logprobs = case["trace_logprob_K"].requires_grad_()
    pair_loss(name, **case, beta=BETA, label_smoothing=0.0, nll=0.2)[0].backward()
    assert logprobs.grad is not None
    assert logprobs.grad[1] == 0.0  # trace 1 stands in the zero-weight pairs only
    assert (logprobs.grad[[0, 2]] != 0.0).all()


def test_unknown_loss_and_smoothed_ipo_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown loss 'dop'"):
        pair_loss("dop", **group(), beta=BETA, label_smoothing=0.0, nll=0.0)
    with pytest.raises(ValueError, match="ipo has no label smoothing"):
        pair_loss("ipo", **group(), beta=BETA, label_smoothing=0.1, nll=0.0)


# --- TRL as the oracle: a tiny random Llama, a frozen copy as reference, one batch of three pairs -------------------


@pytest.fixture(scope="module")
def trl_case(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A policy that has moved away from its reference, a batch from TRL's collator, and a trainer for each loss."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = ["<pad>", "<eos>", *"abcdefgh"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    rows = Dataset.from_dict(
        {"prompt": ["a b", "c", "d e"], "chosen": [" f g h", " a", " b c"], "rejected": [" a", " b c d e", " f g h"]}
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    reference = LlamaForCausalLM(config)
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))

    def trainer(loss: str) -> Any:
        folder: Path = tmp_path_factory.mktemp(loss)
        arguments = DPOConfig(
            output_dir=str(folder), loss_type=[loss], beta=BETA, use_cpu=True, bf16=False, report_to=[],
            per_device_train_batch_size=3, gradient_checkpointing=False,
        )  # fmt: skip
        return DPOTrainer(
            model=policy, ref_model=reference, args=arguments, train_dataset=rows, processing_class=tokenizer
        )

    trainers = {"dpo": trainer("sigmoid"), "ipo": trainer("ipo")}
    batch = next(iter(trainers["dpo"].get_train_dataloader()))
    return {"policy": policy, "reference": reference, "batch": batch, "trainers": trainers}


def completion_logprobs(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities and token counts of the completions, from plain logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    tokens, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
    logprobs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return (logprobs * mask).sum(1), mask.sum(1)


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_loss_and_gradient_equal_those_of_trl(trl_case: dict[str, Any], name: str) -> None:
    policy, batch = trl_case["policy"].eval(), trl_case["batch"]
    num_pairs = len(batch["input_ids"]) // 2

    policy.zero_grad()
    theirs = trl_case["trainers"][name].compute_loss(policy, batch)
    theirs.backward()
    their_gradient = [parameter.grad.clone() for parameter in policy.parameters()]

    policy.zero_grad()
    logprobs, lengths = completion_logprobs(policy, batch)
    with torch.no_grad():
        reference, _ = completion_logprobs(trl_case["reference"], batch)
    ours, _ = pair_loss(
        name, logprobs, reference, lengths, torch.arange(num_pairs), num_pairs + torch.arange(num_pairs),
        torch.ones(num_pairs), beta=BETA, label_smoothing=0.0, nll=0.0,
    )  # fmt: skip
    (ours / num_pairs).backward()

    torch.testing.assert_close(ours / num_pairs, theirs)
    assert abs(theirs.item() - (math.log(2) if name == "dpo" else (1 / (2 * BETA)) ** 2)) > 0.01  # the policy has moved
    for parameter, gradient in zip(policy.parameters(), their_gradient, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
