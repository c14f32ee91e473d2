"""The engine that a config asks for."""

from __future__ import annotations

from rlsf_ray.config import RunConfig
from rlsf_ray.engines.base import Engine


def build_engine(config: RunConfig, *, threads: int = 0, device: str | None = None) -> Engine:
    """Load the model into the engine of `config`. Raises InputError for a bad model or engine arguments."""
    if config.engine == "vllm":
        from rlsf_ray.engines.vllm_engine import VLLMEngine

        held = config.cluster.max_staleness + 2  # those that prompts may be written with, and one pinned by evaluation
        return VLLMEngine(
            config.model,
            config.learner,
            max_versions=held,
            arguments=config.engine_args,
            deadline_s=config.cluster.deadline_s,
            swap=config.swap,
        )
    from rlsf_ray.engines.transformers_engine import TransformersEngine

    return TransformersEngine(config.model, config.learner, threads=threads, device=device)
