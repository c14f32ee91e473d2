"""How vLLM is started: its arguments, its environment, and what to say when it fails."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rlsf_ray.config_sections import LearnerConfig, ModelConfig
from rlsf_ray.engines.lora import target_modules
from rlsf_ray.errors import EngineError, InputError

ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a process that has asked for CUDA devices cannot fork
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB, without a GPU
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # the actor beside it only waits
}


def engine_arguments(
    model: ModelConfig, learner: LearnerConfig, folder: Path, *, context: int, max_versions: int | None
) -> dict[str, Any]:
    """vLLM's engine arguments for the model in `folder`; with `max_versions` adapters beside it, if not None."""
    chosen: dict[str, Any] = {
        "model": str(folder),
        "dtype": model.dtype,
        "max_logprobs": -1,  # no limit: CoT-decoding may ask for many first tokens
        "disable_log_stats": True,
    }
    if max_versions is not None:
        chosen |= {
            "enable_lora": True,
            "max_loras": max_versions,
            "max_cpu_loras": max_versions,
            "max_lora_rank": _allowed_rank(learner.lora_rank),
            "lora_target_modules": target_modules(folder),  # with the output layer every token is slower
        }
    if not torch.cuda.is_available():
        # vLLM 0.32 on a CPU dies of a prompt with a seed that it reads in two steps
        chosen |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(context, 2048)}
        chosen["enforce_eager"] = True  # compiling takes 45 s at each start and makes writing an eighth faster
    return chosen


async def start(arguments: dict[str, Any], statistics: Any) -> Any:
    """An AsyncLLM. Raises InputError for arguments that vLLM does not know, EngineError with its last errors."""
    set_environment()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    sizes = _output_sizes()
    try:
        parsed = AsyncEngineArgs(**arguments)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"engine_args: vLLM refuses them: {error}; see vLLM's documentation of its engine arguments"
        ) from error
    try:
        return AsyncLLM.from_engine_args(
            parsed,
            usage_context=UsageContext.LLM_CLASS,  # defaults for throughput: twice as many texts at once and more
            stat_loggers=[lambda config, index=0: statistics],
        )
    except Exception as error:  # vLLM raises whatever its parts raise
        raise EngineError(
            f"vLLM did not start ({type(error).__name__}: {error}); its last errors:\n{_errors_since(sizes)}\n"
            "correct engine_args (gpu_memory_utilization and max_model_len where memory is short) or model.name"
        ) from error


class Statistics:
    """Takes the place of vLLM's statistics logger: remembers how full the KV cache was."""

    def __init__(self) -> None:
        self._kv_usage = self._now = 0.0

    def record(self, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
        if scheduler_stats is not None:
            self._now = scheduler_stats.kv_cache_usage
            self._kv_usage = max(self._kv_usage, self._now)

    def take(self) -> float:
        taken, self._kv_usage = self._kv_usage, self._now
        return taken

    def __getattr__(self, name: str) -> Any:
        """The rest of vLLM's logger interface, of which nothing is needed."""
        return lambda *args, **kwargs: None


def set_environment() -> None:
    """What vLLM reads before it is imported. A user's own settings stay."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _allowed_rank(rank: int) -> int:
    """The smallest rank that vLLM has kernels for and that holds `rank`."""
    return next((allowed for allowed in (8, 16, 32, 64, 128, 256, 320, 512) if allowed >= rank), rank)


def _output_sizes() -> dict[int, int]:
    """Where the files that take this process's output and error output end now; without those that are no files."""
    files = [number for number in (1, 2) if Path(f"/proc/self/fd/{number}").is_file()]
    return {number: os.fstat(number).st_size for number in files}


def _errors_since(sizes: Mapping[int, int], lines: int = 12) -> str:
    """The errors that this process and its children have written since, where that goes to files (as under Ray)."""
    written: list[str] = []
    for number, size in sizes.items():
        with Path(f"/proc/self/fd/{number}").open("rb") as file:
            file.seek(size)
            written += file.read().decode(errors="replace").splitlines()
    errors = [line for line in written if re.search(r"(Error|Exception)\b.*: ", line) and "Traceback" not in line]
    return "\n".join(dict.fromkeys(errors[-lines:])) or "(see the output above)"
