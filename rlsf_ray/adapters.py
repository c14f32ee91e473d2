"""LoRA adapters as names and arrays: their checksum, PEFT's own file format, and the canaries that go with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from rlsf_ray.records import Canary

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
CANARY_FILE = "canaries.safetensors"


def checksum(adapter: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over sorted names, shapes, types and bytes: equal content has an equal sum, however it travelled."""
    digest = hashlib.sha256()
    for name in sorted(adapter):
        array = np.ascontiguousarray(adapter[name])
        digest.update(f"{name}|{array.shape}|{array.dtype.str}|".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def scaled(adapter: Mapping[str, np.ndarray], alpha: float) -> dict[str, np.ndarray]:
    """The adapter whose change to the model is `alpha` times as large; at 0 the model is the base model."""
    return {
        name: (array * np.float32(alpha) if alpha else np.zeros_like(array)) if ".lora_B." in name else array
        for name, array in adapter.items()
    }


def between(near: Mapping[str, np.ndarray], far: Mapping[str, np.ndarray], share: float) -> dict[str, np.ndarray]:
    """The adapter so far on the straight way from `near` (share 0) to `far` (share 1), array by array.

    Of two versions of one run it answers as their mixed models do (linear mode connectivity, 1912.05671).
    """
    return {name: (array + np.float32(share) * (far[name] - array)).astype(array.dtype) for name, array in near.items()}


def to_peft(adapter: Mapping[str, np.ndarray], *, base_model: str, lora_alpha: float) -> dict[str, bytes]:
    """The two files that `PeftModel.from_pretrained` reads, by file name.

    Rank and target modules are read off the arrays: `...self_attn.q_proj.lora_A.weight` [rank, in] -> `q_proj`.
    Raises ValueError for names that are not PEFT's, or for more than one rank.
    """
    down = {name: array for name, array in adapter.items() if name.endswith(".lora_A.weight")}
    ranks = {array.shape[0] for array in down.values()}
    if len(down) * 2 != len(adapter) or len(ranks) != 1:
        raise ValueError(
            f"an adapter needs pairs of `*.lora_A.weight` and `*.lora_B.weight` of one rank, got {len(adapter)} arrays,"
            f" {len(down)} of them lora_A, ranks {sorted(ranks)}"
        )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": ranks.pop(),
        "lora_alpha": lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.split(".")[-3] for name in down}),
        "inference_mode": True,
    }
    weights = {name: np.ascontiguousarray(array) for name, array in adapter.items()}
    return {
        WEIGHTS_FILE: save(weights, metadata={"format": "pt"}),  # as PEFT marks its own
        CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(),
    }


def to_bytes(weights: Mapping[str, np.ndarray]) -> bytes:
    """Arrays by name as one safetensors file."""
    return save({name: np.ascontiguousarray(array) for name, array in weights.items()})


def from_peft(weights: bytes) -> dict[str, np.ndarray]:
    """Arrays by name from the bytes of `adapter_model.safetensors`. Raises ValueError if they are no such file."""
    try:
        return load(weights)
    except SafetensorError as error:
        raise ValueError(f"not a safetensors file: {error}") from error


def canaries_to_bytes(canaries: Sequence[Canary]) -> bytes:
    """All canaries of a version as one safetensors file."""
    return save({f"{i}/{key}": array for i, canary in enumerate(canaries) for key, array in asdict(canary).items()})


def canaries_from_bytes(data: bytes) -> list[Canary]:
    """What `canaries_to_bytes` was given; none for no bytes. Raises ValueError if it is no such file."""
    if not data:
        return []
    arrays = from_peft(data)
    indices = sorted({int(name.partition("/")[0]) for name in arrays})
    keys = ("prompt_ids", "token_ids", "before", "after")
    return [Canary(**{key: arrays[f"{index}/{key}"] for key in keys}) for index in indices]
