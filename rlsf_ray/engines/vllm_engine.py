"""Generation with vLLM: continuous batching, every version of the adapter under an id of its own.

vLLM's core runs in a child process. A thread here runs the event loop that talks to it, so that `generate` may be
called by many threads at once: what they ask for is batched together, token by token.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as LateError
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from rlsf_ray.adapters import checksum, to_peft
from rlsf_ray.config import LearnerConfig, ModelConfig
from rlsf_ray.engines.base import Adapter, Completion, Request
from rlsf_ray.engines.lora import target_modules, write_merged
from rlsf_ray.engines.models import context_length, find_model, generation_config, load_tokenizer
from rlsf_ray.engines.tokens import check_lengths, completion, encode_prompt, encode_text, eos_ids
from rlsf_ray.engines.version_turn import VersionTurn
from rlsf_ray.errors import EngineError, InputError, WeightsError
from rlsf_ray.records import FloatArray, IntArray, Json, Prompt

CLOSE_S = 10.0  # for what is being written to be given up
DEFAULT_SWAP = {"cuda": "adapter", "cpu": "merged"}  # measured: benchmarks/results/log.md
TOP = 2  # likeliest tokens whose probability is kept for each position
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB, without a GPU
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # the actor beside it only waits
}
MOST_BRANCHES = 64  # likeliest first tokens that CoT-decoding may ask for


class VLLMEngine:
    """An `Engine` over `AsyncLLM`. At most `max_versions` adapters are held; `arguments` go to vLLM as they are.

    `swap` says how a version gets in: "adapter" keeps each under its own id and loads beside what is being written;
    "merged" folds it into the weights between two batches, for devices where vLLM's LoRA kernels are slow.
    """

    def __init__(
        self,
        model: ModelConfig,
        learner: LearnerConfig,
        *,
        max_versions: int,
        arguments: Mapping[str, Any],
        deadline_s: float,
        swap: Literal["adapter", "merged"] | None = None,
    ) -> None:
        self._config, self._learner, self._deadline_s = model, learner, deadline_s
        self._merges = (swap or DEFAULT_SWAP["cuda" if torch.cuda.is_available() else "cpu"]) == "merged"
        self._tokenizer = load_tokenizer(model)
        self._folder = find_model(model.name)
        self._eos = eos_ids(generation_config(self._folder), self._tokenizer)
        self._context = int(arguments.get("max_model_len") or context_length(self._folder))
        self._files = Path(tempfile.mkdtemp(prefix="rlsf-versions-"))  # vLLM loads weights from files
        self._versions: dict[int, Any] = {}  # version -> LoRARequest, or the adapter that is folded in
        self._salts: dict[int, str] = {}  # version -> one for each load
        self._ids = itertools.count()
        self._statistics = _Statistics()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="vllm-client", daemon=True).start()
        self._turn = VersionTurn(self._merge_in)
        self._llm = self._start(self._arguments(max_versions) | dict(arguments))

    def _arguments(self, max_versions: int) -> dict[str, Any]:
        chosen: dict[str, Any] = {
            "model": str(self._folder),
            "dtype": self._config.dtype,
            "max_logprobs": MOST_BRANCHES,
            "disable_log_stats": True,
        }
        if not self._merges:
            chosen |= {
                "enable_lora": True,
                "max_loras": max_versions,
                "max_cpu_loras": max_versions,
                "max_lora_rank": _allowed_rank(self._learner.lora_rank),
                "lora_target_modules": target_modules(self._folder),  # with the output layer every token is slower
            }
        if not torch.cuda.is_available():
            # vLLM 0.32 on a CPU dies of a prompt with a seed that it reads in two steps
            chosen |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(self._context, 2048)}
            chosen["enforce_eager"] = True  # compiling takes 45 s at each start and makes writing an eighth faster
        return chosen

    def _start(self, arguments: dict[str, Any]) -> Any:
        """Raises InputError for arguments that vLLM does not know, EngineError with its last errors if it fails."""
        _set_environment()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        sizes = _output_sizes()
        try:
            parsed = AsyncEngineArgs(**arguments)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"engine_args: vLLM refuses them: {error}; see vLLM's documentation of its engine arguments"
            ) from error

        async def start() -> Any:
            return AsyncLLM.from_engine_args(parsed, stat_loggers=[lambda config, index=0: self._statistics])

        try:
            return asyncio.run_coroutine_threadsafe(start(), self._loop).result()
        except Exception as error:  # vLLM raises whatever its parts raise
            raise EngineError(
                f"vLLM did not start ({type(error).__name__}: {error}); its last errors:\n{_errors_since(sizes)}\n"
                "correct engine_args (gpu_memory_utilization and max_model_len where memory is short) or model.name"
            ) from error

    def _ask(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of `work` on the event loop. Raises EngineError after the deadline, or if the engine is closed."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(self._deadline_s)
        except LateError:
            future.cancel()
            raise EngineError(f"vLLM has not answered for {self._deadline_s:g} s; its log says more") from None
        except CancelledError:
            raise EngineError("vLLM was closed while it was asked; its log says why") from None

    def encode(self, prompt: Prompt) -> IntArray:
        return encode_prompt(self._tokenizer, self._config, prompt)

    def encode_text(self, text: str) -> IntArray:
        """Token ids of plain text that continues a trace (no special tokens)."""
        return encode_text(self._tokenizer, text)

    # --- versions -----------------------------------------------------------------------------------------------

    def load_version(self, version: int, adapter: Adapter) -> str:
        """Hold `adapter` as `version`. What is being written goes on."""
        found = checksum(adapter)
        self._versions[version] = dict(adapter) if self._merges else self._add_lora(version, adapter)
        self._salts[version] = f"{found}/{next(self._ids)}"  # each load anew: the last one may have gone wrong
        self._ask(self._turn.forget(version))
        return found

    def _add_lora(self, version: int, adapter: Adapter) -> Any:
        from vllm.lora.request import LoRARequest

        folder = self._files / f"version-{version:04d}"
        folder.mkdir(exist_ok=True)
        files = to_peft(adapter, base_model=self._config.name, lora_alpha=self._learner.lora_alpha)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        request = LoRARequest(lora_name=folder.name, lora_int_id=version, lora_path=str(folder))
        try:
            self._ask(self._llm.add_lora(request))
            held = self._ask(self._llm.list_loras())
        except Exception as error:  # what the worker raised comes as text
            raise self._failed(f"load version {version} from {folder}", error) from error
        if version not in held:
            raise WeightsError(f"vLLM does not hold version {version} after loading it; it holds {sorted(held)}")
        return request

    async def _merge_in(self, version: int) -> None:
        """Write the weights of `version` over those that vLLM has. Nothing is being written meanwhile."""
        folder = self._folder if version == 0 else Path(tempfile.mkdtemp(prefix="merged-", dir=self._files))
        try:
            if version:
                adapter, alpha = self._versions[version], self._learner.lora_alpha
                await asyncio.to_thread(write_merged, self._folder, adapter, alpha, folder)
            await self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        except Exception as error:  # what the worker raised comes as text
            raise self._failed(f"load version {version} from {folder}", error) from error
        finally:
            if version:
                shutil.rmtree(folder, ignore_errors=True)

    def _failed(self, what: str, error: Exception) -> EngineError | WeightsError:
        """The error that says what vLLM could not do: the engine's, if its core process has died."""
        if isinstance(error, EngineError) or not self.alive():
            return EngineError(f"vLLM has died and could not {what}: {error}; its log says why")
        return WeightsError(f"vLLM could not {what}: {type(error).__name__}: {error}")

    def forget_version(self, version: int) -> None:
        """Drop an adapter that is no longer needed."""
        request = self._versions.pop(version)
        if not self._merges:
            try:
                self._ask(self._llm.remove_lora(version))
            except Exception as error:  # as above
                raise self._failed(f"drop version {version}", error) from error
            shutil.rmtree(request.lora_path, ignore_errors=True)

    def _lora(self, version: int) -> Any:
        """The adapter that vLLM writes `version` with; None for the base, or where it is folded in."""
        if version and version not in self._versions:
            raise EngineError(f"version {version} is not loaded (loaded: {sorted(self._versions)}); load it first")
        return None if self._merges else self._versions.get(version)

    @asynccontextmanager
    async def _at(self, version: int) -> AsyncIterator[None]:
        """While `version` can be written with."""
        if not self._merges:
            yield
            return
        async with self._turn.of(version):
            yield

    # --- writing ------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request], version: int) -> list[list[Completion]]:
        check_lengths(requests, self._context)
        lora = self._lora(version)

        async def everything() -> list[list[Completion]]:
            async with self._at(version):
                return await asyncio.gather(*(self._group(request, version, lora) for request in requests))

        written: list[list[Completion]] = self._ask(everything())
        return written

    async def _group(self, request: Request, version: int, lora: Any) -> list[Completion]:
        sampling, prompt = request.sampling, request.prompt_ids.tolist()
        if sampling.method == "branch":
            return await self._branches(request, version, lora)
        temperature = sampling.temperature if sampling.method == "sample" else 0.0
        all_params = [_params(sampling.max_tokens, temperature=temperature, seed=seed) for seed in request.seeds]
        outputs = await asyncio.gather(*(self._run(prompt, params, version, lora) for params in all_params))
        return [completion(self._tokenizer, *_read(output.outputs[0])) for output in outputs]

    async def _branches(self, request: Request, version: int, lora: Any) -> list[Completion]:
        """CoT-decoding: one call for the first tokens, then one greedy continuation of each (2402.10200)."""
        prompt, count = request.prompt_ids.tolist(), len(request.seeds)
        first = await self._run(prompt, _params(1, top=max(TOP, count)), version, lora)
        ranked = sorted(first.outputs[0].logprobs[0].items(), key=lambda item: item[1].rank)[:count]
        best = np.exp([alternative.logprob for _, alternative in ranked[:TOP]])
        left = request.sampling.max_tokens - 1

        async def continued(token: int, logprob: float) -> Completion:
            ids, values, finished = [token], np.array([[logprob, *best]], dtype=np.float32), token in self._eos
            if not finished and left:
                output = await self._run([*prompt, token], _params(left), version, lora)
                more, more_values, finished = _read(output.outputs[0])
                ids, values = [*ids, *more], np.concatenate([values, more_values])
            return completion(self._tokenizer, ids, values, finished)

        return list(await asyncio.gather(*(continued(token, alternative.logprob) for token, alternative in ranked)))

    async def _run(self, prompt: list[int], params: Any, version: int, lora: Any) -> Any:
        """vLLM's output of one request. The prefix cache is salted: no adapter reads what another has left there."""
        ids = {"prompt_token_ids": prompt, "cache_salt": self._salts.get(version, "base")}
        final = None
        try:
            async for output in self._llm.generate(ids, params, str(next(self._ids)), lora_request=lora):
                final = output
        except Exception as error:  # a dead core process, arguments it refuses: each of vLLM's own type
            raise EngineError(f"vLLM could not write: {type(error).__name__}: {error}; its log says more") from None
        return final

    # --- reading ------------------------------------------------------------------------------------------------

    def logprobs(self, texts: Sequence[tuple[IntArray, IntArray]], version: int) -> list[FloatArray]:
        """For each (prompt ids, trace ids): the log-probs [T] that `version` gives to the trace's tokens."""
        lora, params = self._lora(version), _params(1, prompt_logprobs=0)

        async def one(prompt_ids: IntArray, token_ids: IntArray) -> FloatArray:
            ids = [*prompt_ids.tolist(), *token_ids.tolist()]
            output = await self._run(ids, params, version, lora)
            start = len(prompt_ids)
            read = [output.prompt_logprobs[start + t][token].logprob for t, token in enumerate(ids[start:])]
            return np.asarray(read, dtype=np.float32)

        async def all_of_them() -> list[FloatArray]:
            async with self._at(version):
                return await asyncio.gather(*(one(*text) for text in texts))

        return self._ask(all_of_them())

    def usage(self) -> Json:
        """{"kv_usage": largest share of the KV cache in use since the last call}."""
        return {"kv_usage": self._statistics.take()}

    def alive(self) -> bool:
        """False once vLLM's core process has died."""
        return self._llm is not None and not self._llm.errored

    def close(self) -> None:
        """End vLLM's processes and remove the adapters' files."""

        async def end_all() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:  # callers get EngineError; vLLM's own would take the end of its process for a failure
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        with suppress(LateError):
            asyncio.run_coroutine_threadsafe(end_all(), self._loop).result(CLOSE_S)
        self._llm.shutdown()
        self._llm = None  # it would shut down once more when the interpreter ends, and fail
        self._loop.call_soon_threadsafe(self._loop.stop)
        shutil.rmtree(self._files, ignore_errors=True)


class _Statistics:
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


def _params(max_tokens: int, *, temperature: float = 0.0, seed: int = 0, top: int = TOP, **more: Any) -> Any:
    """vLLM's parameters of one completion; `top` likeliest tokens come with each position."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        logprobs=top,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        **more,
    )


def _read(output: Any) -> tuple[list[int], np.ndarray, bool]:
    """(token ids, [T, 3] log-prob of the chosen token with the two largest probabilities, ended by itself)."""
    values = np.empty((len(output.token_ids), 3), dtype=np.float32)
    for position, (token, likely) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        largest = sorted((one.logprob for one in likely.values()), reverse=True)[:TOP]
        values[position] = [likely[token].logprob, *np.exp(largest)]
    return list(output.token_ids), values, output.finish_reason == "stop"


def _set_environment() -> None:
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
