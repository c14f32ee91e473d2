"""Generation with vLLM: continuous batching, every version of the adapter under an id of its own.

vLLM's core runs in a child process. A thread here runs the event loop that talks to it, so that `generate` may be
called by many threads at once: what they ask for is batched together, token by token.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from concurrent.futures import TimeoutError as LateError
from concurrent.futures import wait
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch

from rlsf_ray.adapters import checksum, to_peft
from rlsf_ray.config_sections import LearnerConfig, ModelConfig
from rlsf_ray.engines.base import Adapter, Completion, Request
from rlsf_ray.engines.lora import check_mergeable, merges, write_merged
from rlsf_ray.engines.models import context_length, find_model, generation_config, load_tokenizer, most_tokens
from rlsf_ray.engines.scratch import Scratch
from rlsf_ray.engines.tokens import check_lengths, completion, encode_prompt, encode_reply, encode_text, eos_ids
from rlsf_ray.engines.version_turn import VersionTurn
from rlsf_ray.engines.vllm_batch import Together
from rlsf_ray.engines.vllm_params import Ask, begun, first_asks, read_output, read_prompt, sampling_params
from rlsf_ray.engines.vllm_start import Statistics, engine_arguments, start
from rlsf_ray.errors import EngineError, WeightsError
from rlsf_ray.records import FloatArray, IntArray, Json, Prompt

LOOK_S = 1.0  # how often a waiting call asks whether the engine lives
CLOSE_S = 10.0  # for what is being written to be given up


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
        self.one_version = merges(swap)
        self._tokenizer = load_tokenizer(model)
        self._folder = find_model(model.name)
        self._eos = eos_ids(generation_config(self._folder), self._tokenizer)
        self._context = most_tokens(context_length(self._folder), arguments)
        self._scratch = Scratch()  # vLLM loads weights from files
        self._versions: dict[int, Any] = {}  # version -> LoRARequest, or the adapter that is folded in
        self._salts: dict[int, str] = {}  # version -> one for each load
        self._ids = itertools.count()
        self._statistics = Statistics()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="vllm-client", daemon=True).start()
        self._turn = VersionTurn(self._merge_in)
        if self.one_version:
            check_mergeable(self._folder)
        adapters = None if self.one_version else max_versions
        chosen = engine_arguments(model, learner, self._folder, context=self._context, max_versions=adapters)
        starting = start(chosen | dict(arguments), self._statistics)
        starts = asyncio.run_coroutine_threadsafe(starting, self._loop)
        if not wait([starts], deadline_s).done:
            raise EngineError(
                f"vLLM has not started within {deadline_s:g} s; its log says more; raise cluster.deadline_s"
            )
        self._llm = starts.result()
        self._together = Together(self._llm)

    def _ask(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of `work` on the event loop.

        Raises EngineError after the deadline, or if the engine has died or is closed: vLLM itself would leave some
        calls unanswered then.
        """
        future, until = asyncio.run_coroutine_threadsafe(work, self._loop), time.monotonic() + self._deadline_s
        while not wait([future], LOOK_S).done and self.alive() and time.monotonic() < until:
            pass
        if future.done() and not future.cancelled():
            return future.result()
        future.cancel()
        late = f"has not answered for {self._deadline_s:g} s" if self.alive() else "has died, or was closed"
        raise EngineError(f"vLLM {late}; its log says more")

    def encode(self, prompt: Prompt) -> IntArray:
        return encode_prompt(self._tokenizer, self._config, prompt)

    def encode_text(self, text: str) -> IntArray:
        """Token ids of plain text that continues a trace (no special tokens)."""
        return encode_text(self._tokenizer, text)

    def encode_reply(self, text: str, last: int) -> IntArray:
        """Token ids between a written turn that ends with the token `last` and the next one: the user says `text`."""
        return encode_reply(self._tokenizer, self._config, text, last, self._eos)

    # --- versions -----------------------------------------------------------------------------------------------

    def load_version(self, version: int, adapter: Adapter) -> str:
        """Hold `adapter` as `version`. What is being written goes on."""
        found = checksum(adapter)
        if self.one_version:
            self._versions[version] = dict(adapter)
            self._write_merged(version)  # beforehand: what is being written goes on meanwhile
        else:
            self._versions[version] = self._add_lora(version, adapter)
        self._salts[version] = f"{found}/{next(self._ids)}"  # each load anew: the last one may have gone wrong
        self._ask(self._turn.forget(version))
        return found

    def _add_lora(self, version: int, adapter: Adapter) -> Any:
        from vllm.lora.request import LoRARequest

        folder = self._scratch.path / f"version-{version:04d}"
        folder.mkdir(exist_ok=True)
        files = to_peft(adapter, base_model=self._config.name, lora_alpha=self._learner.lora_alpha)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        request = LoRARequest(lora_name=folder.name, lora_int_id=version, lora_path=str(folder))
        try:
            self._ask(self._llm.add_lora(request))
            held = self._ask(self._llm.list_loras())
        except Exception as error:  # what the worker raised comes as text
            expected = sum(map(len, files.values()))
            raise self._failed(f"load version {version} from {_with_size(folder, expected)}", error) from error
        if version not in held:
            raise WeightsError(f"vLLM does not hold version {version} after loading it; it holds {sorted(held)}")
        return request

    def _merged(self, version: int) -> Path:
        return self._scratch.path / f"merged-{version:04d}"

    def _write_merged(self, version: int) -> None:
        try:
            dtype = getattr(torch, self._config.dtype)
            write_merged(self._folder, self._versions[version], self._learner.lora_alpha, dtype, self._merged(version))
        except OSError as error:
            raise self._failed(f"write version {version} to {self._merged(version)}", error) from error

    async def _merge_in(self, version: int) -> None:
        """Write the weights of `version` over those that vLLM has. Nothing is being written meanwhile."""
        folder = self._merged(version) if version else self._folder
        try:
            if not folder.exists():  # it was used up when this version came in before
                await asyncio.to_thread(self._write_merged, version)
            await self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        except Exception as error:  # what the worker raised comes as text
            base = sum(file.stat().st_size for file in self._folder.glob("*.safetensors"))
            raise self._failed(f"load version {version} from {_with_size(folder, base)}", error) from error
        finally:
            if version:
                shutil.rmtree(folder, ignore_errors=True)  # as large as the model

    def _failed(self, what: str, error: Exception) -> EngineError | WeightsError:
        """The error that says what vLLM could not do: the engine's, if it has died or does not answer."""
        if isinstance(error, EngineError) or not self.alive():
            return EngineError(f"vLLM could not {what}: {error}; its log says why")
        return WeightsError(f"vLLM could not {what}: {type(error).__name__}: {error}")

    def forget_version(self, version: int) -> None:
        """Drop an adapter that is no longer needed, if it is held."""
        request = self._versions.pop(version, None)
        if request is None:
            return
        if self.one_version:
            shutil.rmtree(self._merged(version), ignore_errors=True)
            return
        try:
            self._ask(self._llm.remove_lora(version))
        except Exception as error:  # as above
            raise self._failed(f"drop version {version}", error) from error
        shutil.rmtree(request.lora_path, ignore_errors=True)

    def _lora(self, version: int) -> Any:
        """The adapter that vLLM writes `version` with; None for the base, or where it is folded in."""
        if version and version not in self._versions:
            raise EngineError(f"version {version} is not loaded (loaded: {sorted(self._versions)}); load it first")
        return None if self.one_version else self._versions.get(version)

    @asynccontextmanager
    async def _at(self, version: int) -> AsyncIterator[None]:
        """While `version` can be written with."""
        if not self.one_version:
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
                asked = [first_asks(request) for request in requests]
                outputs = iter(await self._outputs([ask for asks in asked for ask in asks], version, lora))
                groups = [[next(outputs) for _ in asks] for asks in asked]
                return await self._completed(requests, groups, version, lora)

        written: list[list[Completion]] = self._ask(everything())
        return written

    async def _completed(
        self, requests: Sequence[Request], groups: Sequence[Sequence[Any]], version: int, lora: Any
    ) -> list[list[Completion]]:
        """Traces from vLLM's outputs; those of CoT-decoding go on from their first token."""
        branches = {
            (index, k): branch
            for index, (request, group) in enumerate(zip(requests, groups, strict=True))
            if request.sampling.method == "branch"
            for k, branch in enumerate(begun(request, group[0].outputs[0], self._eos))
        }
        open_ones = {place: branch for place, branch in branches.items() if branch.goes_on}
        outputs = await self._outputs([branch.ask for branch in open_ones.values()], version, lora)
        for branch, output in zip(open_ones.values(), outputs, strict=True):
            branch.add(*read_output(output.outputs[0]))
        written: list[list[Completion]] = [[] for _ in requests]
        for (index, _), branch in branches.items():
            written[index].append(completion(self._tokenizer, branch.ids, branch.values, branch.finished))
        for index, group in enumerate(groups):
            if requests[index].sampling.method != "branch":
                written[index] = [completion(self._tokenizer, *read_output(one.outputs[0])) for one in group]
        return written

    async def _outputs(self, asks: Sequence[Ask], version: int, lora: Any) -> list[Any]:
        """vLLM's output of each request. The prefix cache is salted: no adapter reads what another has left there."""
        salt = self._salts.get(version, "base")

        async def output(ask: Ask) -> Any:
            ids = {"type": "token", "prompt_token_ids": ask.ids, "cache_salt": salt}
            asked = self._llm.generate(ids, ask.params, str(next(self._ids)), lora_request=lora)
            (final,) = [output async for output in asked]
            return final

        try:
            return await self._together.run([output(ask) for ask in asks])
        except Exception as error:  # a dead core process, arguments it refuses: each of vLLM's own type
            raise EngineError(f"vLLM could not write: {type(error).__name__}: {error}; its log says more") from None

    # --- reading ------------------------------------------------------------------------------------------------

    def logprobs(self, texts: Sequence[tuple[IntArray, IntArray]], version: int) -> list[FloatArray]:
        """For each (prompt ids, trace ids): the log-probs [T] that `version` gives to the trace's tokens."""
        lora, params = self._lora(version), sampling_params(1, prompt_logprobs=0)

        async def all_of_them() -> list[FloatArray]:
            async with self._at(version):
                asks = [Ask([*prompt.tolist(), *trace.tolist()], params) for prompt, trace in texts]
                outputs = await self._outputs(asks, version, lora)
                return [
                    read_prompt(output, ask.ids, len(prompt))
                    for output, ask, (prompt, _) in zip(outputs, asks, texts, strict=True)
                ]

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
        self._scratch.close()


def _with_size(folder: Path, expected: int) -> str:
    """`folder` as an error names it: what is there and what should be."""
    return f"{folder} ({sum(file.stat().st_size for file in folder.iterdir())} bytes, expected about {expected})"
