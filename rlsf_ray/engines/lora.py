"""The adapter on a base model: one place that knows PEFT's names and shapes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rlsf_ray.config import RunConfig
from rlsf_ray.config_sections import LearnerConfig
from rlsf_ray.errors import InputError, WeightsError

HEAD_WEIGHT = "reward_head.weight"  # of a reward model, beside its adapter
DEFAULT_SWAP = {"cuda": "adapter", "cpu": "merged"}  # measured on CPUs: benchmarks/results/log.md


def add_adapter(model: Any, config: LearnerConfig, *, seed: int, dtype: torch.dtype) -> Any:
    """Wrap `model` with a LoRA on every linear layer, initialised from `seed` alone (B is zero).

    The initialisation must not depend on the process, so it is drawn here and not by PEFT.
    """
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(
        model,
        LoraConfig(
            r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    for name, parameter in _trained_parameters(wrapped):
        parameter.data = parameter.data.to(dtype)
        if "lora_A" in name:
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            bound = 1 / math.sqrt(parameter.shape[1])  # PEFT's own: kaiming uniform with a = sqrt(5)
            values = torch.rand(parameter.shape, generator=generator) * (2 * bound) - bound
            parameter.data.copy_(values.to(dtype))
    sum_at_once(wrapped, at_once=True)
    return wrapped


def add_reward_head(wrapped: Any) -> None:
    """Give a model with an adapter a scalar head on its last hidden state; zero at first: it prefers nothing."""
    size = wrapped.get_base_model().get_output_embeddings().weight.shape[1]
    head = torch.nn.Linear(size, 1, bias=False, dtype=torch.float32, device=wrapped.device)
    torch.nn.init.zeros_(head.weight)
    wrapped.reward_head = head


def sum_at_once(wrapped: Any, *, at_once: bool) -> None:
    """Whether each layer rounds base and adapter as one sum, or (as PEFT, and vLLM's LoRA kernels) the base first.

    In bfloat16 an adapter's share is often less than half a step of the base's output. Added once that is rounded, it
    is lost: of a first round's change 40 % (benchmarks/results/log.md).
    """
    for layer in wrapped.modules():
        if isinstance(layer, LoraLinear) and type(layer.base_layer) is torch.nn.Linear:
            if at_once:
                layer.forward = MethodType(_one_sum, layer)
            else:
                layer.__dict__.pop("forward", None)


def sums_at_once(config: RunConfig) -> bool:
    """Whether the generators of `config` round base and adapter as one sum: all but vLLM with `swap: adapter`."""
    return config.engine != "vllm" or merges(config.swap)


def merges(swap: str | None) -> bool:
    """Whether vLLM has a version folded into its weights; `swap` None: what is faster on the device."""
    return (swap or DEFAULT_SWAP["cuda" if torch.cuda.is_available() else "cpu"]) == "merged"


def _one_sum(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """W x + scaling * B A x, summed in float32 within the product and rounded once; then the bias, if there is one."""
    base = layer.base_layer
    if layer.disable_adapters:
        return base(x)
    (name,) = layer.active_adapters
    down, up = layer.lora_A[name], layer.lora_B[name]
    delta = (up(down(x.to(down.weight.dtype))) * layer.scaling[name]).to(x.dtype)
    total = torch.addmm(delta.flatten(0, -2), x.flatten(0, -2), base.weight.t()).view(delta.shape)
    return total if base.bias is None else total + base.bias


def target_modules(folder: Path) -> list[str]:
    """Last names of the layers that `add_adapter` gives a LoRA."""
    return sorted({name.rpartition(".")[2] for name in _linear_layers(folder)})


def check_mergeable(folder: Path) -> None:
    """Raise InputError where an adapter cannot be folded into the model's files by the names of its layers."""
    there: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            there |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
    for name, shape in _linear_layers(folder).items():
        if there.get(f"{name}.weight") != shape:
            raise InputError(
                f"swap=merged folds versions into the model's safetensors files, expected {name}.weight with shape"
                f" {shape} there, got {there.get(f'{name}.weight', 'none')} ({folder}); set swap: adapter, or convert"
                " the model with transformers' save_pretrained"
            )


def _linear_layers(folder: Path) -> dict[str, list[int]]:
    """Every layer that `add_adapter` gives a LoRA, all linear ones but the output layer, with its weight's shape."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder, trust_remote_code=False), trust_remote_code=False
        )
    head = model.get_output_embeddings()
    found = {}
    for name, one in model.named_modules():
        if isinstance(one, torch.nn.Linear | Conv1D) and one is not head:
            shape = list(one.weight.shape)
            found[name] = shape if isinstance(one, torch.nn.Linear) else ["transposed", *shape]
    return found


def write_merged(
    folder: Path, adapter: Mapping[str, np.ndarray], lora_alpha: float, dtype: torch.dtype, target: Path
) -> None:
    """Write the model of `folder` with `adapter` folded in to `target`, as one safetensors file.

    The sum is made in float32 from the base on disk, as `dtype` has it, and rounded once: sums on sums would drift.
    Raises WeightsError for an adapter with numbers that are not finite.
    """
    if odd := [name for name, array in adapter.items() if not np.isfinite(array).all()]:
        raise WeightsError(f"the adapter's {odd[0]} holds nan or inf, expected finite numbers; train with a lower rate")
    weights = {
        name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
    for name, down in adapter.items():
        if not name.endswith(".lora_A.weight"):
            continue
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        up = torch.tensor(adapter[name.replace(".lora_A.", ".lora_B.")], dtype=torch.float32)
        base = weights[f"{layer}.weight"].to(dtype)
        delta = lora_alpha / len(down) * (up @ torch.tensor(down, dtype=torch.float32))
        weights[f"{layer}.weight"] = rounded(base.float() + delta, dtype, layer)
    target.mkdir(parents=True, exist_ok=True)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def rounded(values: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Finite float32 values in `dtype`; in bfloat16 up or down by chance, the nearer more often: the mean stays.

    What an adapter adds to a weight is often less than half a step of bfloat16. Rounded to the nearest it would be
    gone: a third of what SmolLM2 had learned (benchmarks/results/log.md). Chance depends on `name` alone, so that a
    weight which hardly changes from one version to the next is rounded alike in both.
    """
    if dtype != torch.bfloat16:
        return values.to(dtype)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    below = np.random.Generator(np.random.SFC64(seed)).integers(0, 1 << 16, tuple(values.shape), dtype=np.uint16)
    bits = values.contiguous().view(torch.int32) + torch.from_numpy(below.astype(np.int32))
    return bits.bitwise_and_(-(1 << 16)).view(torch.float32).to(dtype)  # cut off after 16 of 32 bits


def _trained_parameters(wrapped: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((n, p) for n, p in wrapped.named_parameters() if "lora_" in n or n == HEAD_WEIGHT)


def _public_name(name: str) -> str:
    return name.replace(".default.", ".")  # PEFT leaves the adapter's name out of its files


def adapter_arrays(wrapped: Any) -> dict[str, np.ndarray]:
    """The adapter as float32 arrays under the names PEFT uses in its files."""
    return {_public_name(n): p.detach().float().cpu().numpy().copy() for n, p in _trained_parameters(wrapped)}


def load_adapter(wrapped: Any, adapter: Mapping[str, np.ndarray]) -> None:
    """Write `adapter` into the wrapped model in place. Raises WeightsError on other names or shapes."""
    own = {_public_name(name): parameter for name, parameter in _trained_parameters(wrapped)}
    if own.keys() != adapter.keys():
        odd = sorted(own.keys() ^ adapter.keys())
        raise WeightsError(
            f"adapter does not fit the model: expected {len(own)} tensors, got {len(adapter)}, they differ at {odd[0]};"
            " was it made for another model or other LoRA targets?"
        )
    for name, parameter in own.items():
        if tuple(parameter.shape) != adapter[name].shape:
            raise WeightsError(
                f"adapter tensor {name}: expected shape {tuple(parameter.shape)}, got {adapter[name].shape};"
                " was lora_rank changed?"
            )
        parameter.data.copy_(torch.tensor(adapter[name]))


@dataclass(frozen=True, slots=True)
class Head:
    """From hidden states [N, D] to logits [N, V]. `weight` [V, D], `bias` [V]."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    cap: float | None  # final soft-capping (Gemma)

    def __call__(self, hidden: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        """Logits, or only those of the vocabulary's `columns`."""
        bias = None if self.bias is None else self.bias[columns]
        logits = torch.nn.functional.linear(hidden, self.weight[columns], bias)
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits


def body_and_head(model: Any) -> tuple[Any, Head]:
    """(body that returns hidden states, function from hidden states to logits) of a causal LM, adapter or not."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    output = inner.get_output_embeddings()
    cap = getattr(inner.config, "final_logit_softcapping", None)
    return inner.get_decoder(), Head(output.weight, getattr(output, "bias", None), cap)


@torch.no_grad()
def check_logits(model: Any) -> None:
    """Raise InputError where `body_and_head` does not give the model's own logits (an unknown last step)."""
    ids = torch.arange(1, 9, device=model.device)[None]
    body, head = body_and_head(model)
    ours = head(body(input_ids=ids, use_cache=False).last_hidden_state).float()
    own = model(input_ids=ids, use_cache=False).logits.float()
    worst = (ours - own).abs().max().item()
    if worst > 1e-2 * own.abs().max().item():
        raise InputError(
            f"{type(model).__name__} does something to its logits that this project does not know: they differ by"
            f" {worst:.3g}; use another model, or teach rlsf_ray/engines/lora.py:body_and_head"
        )
