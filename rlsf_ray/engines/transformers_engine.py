"""Batched generation with transformers: one decoding loop that keeps statistics and drops logits.

Letters in shapes: R rows (traces in flight), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from rlsf_ray.adapters import checksum
from rlsf_ray.config_sections import LearnerConfig, ModelConfig
from rlsf_ray.engines.base import Adapter, Completion, Request
from rlsf_ray.engines.lora import adapter_arrays, add_adapter, load_adapter
from rlsf_ray.engines.models import context_length, find_model, load_model, load_tokenizer
from rlsf_ray.engines.packing import read_texts
from rlsf_ray.engines.tokens import check_lengths, completion, encode_prompt, encode_reply, encode_text, eos_ids
from rlsf_ray.errors import EngineError, WeightsError
from rlsf_ray.records import FloatArray, IntArray, Json, Prompt

TOKEN_BUDGET = 1 << 16  # cached tokens (rows x length) of one decoding batch; larger requests are split
COMPACT_BELOW = 0.75  # drop finished rows from the batch once fewer than this share are alive


class TransformersEngine:
    """An `Engine` in this process. Keeps every loaded version as arrays and writes the asked one in place."""

    one_version = False

    def __init__(
        self, model: ModelConfig, learner: LearnerConfig, *, threads: int = 0, device: str | None = None
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._config, self._most_tokens = model, learner.max_tokens_per_pass
        self._tokenizer = load_tokenizer(model)
        base = load_model(model, device=device)
        self._eos = eos_ids(base.generation_config, self._tokenizer)
        self._context = context_length(find_model(model.name))
        self._model = add_adapter(base, learner, seed=0, dtype=base.dtype).eval()
        self._adapters: dict[int, Adapter] = {}
        self._active = 0

    def encode(self, prompt: Prompt) -> IntArray:
        return encode_prompt(self._tokenizer, self._config, prompt)

    def encode_text(self, text: str) -> IntArray:
        """Token ids of plain text that continues a trace (no special tokens)."""
        return encode_text(self._tokenizer, text)

    def encode_reply(self, text: str, last: int) -> IntArray:
        """Token ids between a written turn that ends with the token `last` and the next one: the user says `text`."""
        return encode_reply(self._tokenizer, self._config, text, last, self._eos)

    def load_version(self, version: int, adapter: Adapter) -> str:
        """Keep `adapter` as `version` and make it active; what the model then holds is read back and compared."""
        load_adapter(self._model, adapter)
        held = adapter_arrays(self._model)
        for name, array in adapter.items():
            expected = torch.tensor(array).to(self._model.dtype).float().numpy()
            if not np.array_equal(held[name], expected):
                raise WeightsError(f"version {version}: {name} is not what was loaded; reload the generator")
        self._adapters[version] = adapter
        self._active = version
        return checksum(adapter)

    def forget_version(self, version: int) -> None:
        """Drop an adapter that is no longer needed, if it is held."""
        self._adapters.pop(version, None)
        if self._active == version:
            self._active = 0

    def generate(self, requests: Sequence[Request], version: int) -> list[list[Completion]]:
        check_lengths(requests, self._context)
        self._activate(version)
        results: list[list[Completion]] = []
        for batch in _within_budget(requests):
            if version == 0:
                with self._model.disable_adapter():
                    results += self._decode(batch)
            else:
                results += self._decode(batch)
        return results

    @torch.inference_mode()
    def logprobs(self, texts: Sequence[tuple[IntArray, IntArray]], version: int) -> list[FloatArray]:
        """For each (prompt ids, trace ids): the log-probs [T] that `version` gives to the trace's tokens."""
        self._activate(version)
        with self._model.disable_adapter() if version == 0 else nullcontext():
            return read_texts(self._model, texts, self._most_tokens)

    def usage(self) -> Json:
        """Nothing: a batch is split where it would not fit."""
        return {}

    def alive(self) -> bool:
        """True: it has no process of its own."""
        return True

    def close(self) -> None:
        """Nothing outlives this object."""

    def _activate(self, version: int) -> None:
        if version in (0, self._active):
            return
        if version not in self._adapters:
            raise EngineError(f"version {version} is not loaded (loaded: {sorted(self._adapters)}); load it first")
        load_adapter(self._model, self._adapters[version])
        self._active = version

    @torch.inference_mode()
    def _decode(self, requests: Sequence[Request]) -> list[list[Completion]]:
        prompts = {request.prompt_ids.tobytes(): request.prompt_ids for request in requests}
        state = _Prefill(self._model, list(prompts.values()))
        rows = [(r, k) for r, request in enumerate(requests) for k in range(len(request.seeds))]
        place = {key: index for index, key in enumerate(prompts)}
        state.select(torch.tensor([place[requests[r].prompt_ids.tobytes()] for r, _ in rows]))
        choose = _Chooser(rows, requests, self._model.device)
        limits = np.array([requests[r].sampling.max_tokens for r, _ in rows])
        tokens: list[list[int]] = [[] for _ in rows]
        statistics: list[list[np.ndarray]] = [[] for _ in rows]
        alive = np.arange(len(rows))  # row of the batch -> trace
        ended = np.zeros(len(rows), dtype=bool)  # by its own end-of-sequence token
        for step in range(limits.max()):
            chosen, values = choose(state.logits, alive, step)
            for row, trace in enumerate(alive):
                if not ended[trace] and step < limits[trace]:
                    tokens[trace].append(int(chosen[row]))
                    statistics[trace].append(values[row])
                    ended[trace] = int(chosen[row]) in self._eos
            keep = ~ended[alive] & (step + 1 < limits[alive])
            if not keep.any():
                break
            if keep.mean() < COMPACT_BELOW:
                alive, index = alive[keep], torch.from_numpy(np.flatnonzero(keep))
                state.select(index)
                chosen = chosen[keep]
            state.advance(torch.from_numpy(chosen))
        results: list[list[Completion]] = [[] for _ in requests]
        for (request, _), ids, kept, finished in zip(rows, tokens, statistics, ended, strict=True):
            results[request].append(
                completion(self._tokenizer, ids, np.asarray(kept, dtype=np.float32), bool(finished))
            )
        return results


class _Prefill:
    """Left-padded prompts, their key-value cache, and the logits [R, V] of the next token."""

    def __init__(self, model: Any, prompts: Sequence[IntArray]) -> None:
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.zeros((len(prompts), longest), dtype=torch.long)
        self._mask = torch.zeros((len(prompts), longest), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            self._mask[row, longest - len(prompt) :] = 1
        self._model = model
        self._mask = self._mask.to(model.device)
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
        self._next_position = positions[:, -1:] + 1
        self._cache: Any = None
        self._forward(ids.to(model.device), positions)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> None:
        output = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = output.past_key_values
        self.logits = output.logits[:, -1].float()

    def select(self, index: torch.Tensor) -> None:
        """Keep, drop or repeat rows."""
        index = index.to(self._mask.device)
        self._cache.batch_select_indices(index)
        self._mask, self._next_position = self._mask[index], self._next_position[index]
        self.logits = self.logits[index]

    def advance(self, chosen: torch.Tensor) -> None:
        """Feed one chosen token [R] for each row."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
        self._forward(chosen.to(self._mask.device)[:, None], self._next_position)
        self._next_position = self._next_position + 1


class _Chooser:
    """Picks the next token of each row, and its statistics (log-prob, top-1, top-2 of the raw distribution)."""

    def __init__(self, rows: Sequence[tuple[int, int]], requests: Sequence[Request], device: Any) -> None:
        own = [requests[r].sampling for r, _ in rows]
        longest = max(sampling.max_tokens for sampling in own)
        # one stream of uniform numbers for each trace, whatever batch it is in
        uniform = np.zeros((len(rows), longest))
        for row, (r, k) in enumerate(rows):
            if own[row].method == "sample":
                uniform[row] = np.random.default_rng(requests[r].seeds[k]).random(longest)
        self._uniform = torch.tensor(uniform, dtype=torch.float32, device=device)
        self._temperature = torch.tensor([sampling.temperature for sampling in own], device=device)
        self._samples = np.array([sampling.method == "sample" for sampling in own])
        self._first_rank = np.array([k if own[row].method == "branch" else 0 for row, (_, k) in enumerate(rows)])

    def __call__(self, logits: torch.Tensor, alive: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        total = logits.logsumexp(-1, keepdim=True)
        top_values, top_ids = logits.topk(2, dim=-1)
        chosen = top_ids[:, 0]
        if step == 0 and self._first_rank.any():
            ranked = logits.topk(int(self._first_rank.max()) + 1, dim=-1).indices
            chosen = ranked.gather(1, torch.from_numpy(self._first_rank[alive]).to(ranked.device)[:, None])[:, 0]
        samples = torch.from_numpy(self._samples[alive]).to(logits.device)
        if samples.any():
            chosen = torch.where(samples, self._sample(logits, alive, step), chosen)
        logprob = logits.gather(1, chosen[:, None]) - total
        statistics = torch.cat([logprob, (top_values - total).exp()], dim=1)
        return chosen.cpu().numpy(), statistics.cpu().numpy()

    def _sample(self, logits: torch.Tensor, alive: np.ndarray, step: int) -> torch.Tensor:
        """Inverse of the cumulative distribution at one uniform number for each row."""
        highest = logits.max(-1, keepdim=True).values
        cumulative = ((logits - highest) / self._temperature[alive, None]).exp_().cumsum(-1)
        target = self._uniform[alive, step, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[1] - 1)[:, 0]


def _within_budget(requests: Sequence[Request]) -> list[list[Request]]:
    """Split requests so that rows x (longest prompt + max_tokens) stays under the budget; at least one in each."""
    batches: list[list[Request]] = []
    rows = longest = most = 0
    for request in requests:
        wide, deep = max(longest, len(request.prompt_ids)), max(most, request.sampling.max_tokens)
        if batches and (rows + len(request.seeds)) * (wide + deep) <= TOKEN_BUDGET:
            batches[-1].append(request)
            rows, longest, most = rows + len(request.seeds), wide, deep
        else:
            batches.append([request])
            rows, longest, most = len(request.seeds), len(request.prompt_ids), request.sampling.max_tokens
    return batches
