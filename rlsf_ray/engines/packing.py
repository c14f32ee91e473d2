"""Log-probs of many groups' traces in one pass, each trace and each prompt read once.

One row holds a group: the prompt, then its K traces one after the other; a trace's tokens see the prompt and their
own trace only (a block mask), and their positions go on from the prompt. Equal to one row for each trace.
Letters in shapes: B rows, L tokens of a row, N completion tokens of all rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlsf_ray.engines.chunked import token_logprobs, token_logprobs_and_entropies
from rlsf_ray.engines.lora import body_and_head
from rlsf_ray.records import FloatArray, IntArray

_STATEFUL = {"mamba", "mamba2", "rwkv", "jamba", "zamba2", "recurrent_gemma", "bamba"}  # state flows past any mask
_PADDING = -1


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt [P] and the traces [T] that follow it."""

    prompt_ids: IntArray
    traces: Sequence[IntArray]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + sum(len(trace) for trace in self.traces)


def can_share_prompt(model: Any) -> bool:
    """True where a hand-made block mask means the same to every layer: full attention under sdpa or eager."""
    config = (model.get_base_model() if hasattr(model, "get_base_model") else model).config
    layers = getattr(config, "layer_types", None)
    full = all(kind == "full_attention" for kind in layers) if layers else not getattr(config, "sliding_window", None)
    return bool(full) and config._attn_implementation in ("sdpa", "eager") and config.model_type not in _STATEFUL


def trace_logprobs(model: Any, rows: Sequence[Row], temperature: float = 1.0) -> list[list[torch.Tensor]]:
    """For each row, the log-probs [T] of each trace's tokens given the prompt; float32, with gradients if enabled.

    `temperature`: of the distribution that they are read from.
    """
    hidden, targets = hidden_states(model, rows)
    _, head = body_and_head(model)
    return by_trace(token_logprobs(head, hidden, targets, temperature), rows)


def trace_logprobs_and_entropies(
    model: Any, rows: Sequence[Row], temperature: float, *, gradient: bool
) -> tuple[list[list[torch.Tensor]], torch.Tensor]:
    """`trace_logprobs`, and the entropy [N] of every token's distribution; `gradient`: through the entropies too."""
    hidden, targets = hidden_states(model, rows)
    _, head = body_and_head(model)
    logprobs, entropy = token_logprobs_and_entropies(head, hidden, targets, temperature, gradient=gradient)
    return by_trace(logprobs, rows), entropy


def hidden_states(model: Any, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden states [N, D] that predict the completion tokens, those tokens [N]), trace by trace, row by row."""
    read = _read_shared if can_share_prompt(model) else _read_plain
    return read(model, rows)


def by_trace(values: torch.Tensor, rows: Sequence[Row]) -> list[list[torch.Tensor]]:
    """Cut what stands for the completion tokens [N, ...] into pieces: for each row, for each trace [T, ...]."""
    pieces = iter(values.split([len(trace) for row in rows for trace in row.traces]))
    return [[next(pieces) for _ in row.traces] for row in rows]


@torch.no_grad()
def read_texts(model: Any, texts: Sequence[tuple[IntArray, IntArray]], max_tokens: int) -> list[FloatArray]:
    """For each (prompt ids, trace ids): the log-probs [T] of the trace's tokens.

    Passes hold at most `max_tokens` tokens with padding (one text at least).
    """
    rows = [Row(prompt_ids, [token_ids]) for prompt_ids, token_ids in texts]
    return [
        found[0].float().cpu().numpy() for part in in_passes(rows, max_tokens) for found in trace_logprobs(model, part)
    ]


def in_passes(rows: Sequence[Row], max_tokens: int) -> list[list[Row]]:
    """Cut rows, in their order, into passes of at most `max_tokens` tokens with padding (one row at least)."""
    passes: list[list[Row]] = []
    longest = 0
    for row in rows:
        longest = max(longest, row.num_tokens)
        if not passes or (len(passes[-1]) + 1) * longest > max_tokens:
            passes.append([])
            longest = row.num_tokens
        passes[-1].append(row)
    return passes


def _read_shared(model: Any, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [N, D] that predict the targets [N], from one row for each group."""
    longest, device = max(row.num_tokens for row in rows), model.device
    ids, positions = np.zeros((len(rows), longest), dtype=np.int64), np.zeros((len(rows), longest), dtype=np.int64)
    segment = np.full((len(rows), longest), _PADDING)
    sources: list[int] = []
    for index, row in enumerate(rows):
        start = len(row.prompt_ids)
        ids[index, :start], positions[index, :start], segment[index, :start] = row.prompt_ids, np.arange(start), 0
        for k, trace in enumerate(row.traces):
            stop = start + len(trace)
            ids[index, start:stop], segment[index, start:stop] = trace, k + 1
            positions[index, start:stop] = len(row.prompt_ids) + np.arange(len(trace))
            # a trace's first token is predicted by the prompt's last
            first = index * longest
            sources += [first + len(row.prompt_ids) - 1, *range(first + start, first + stop - 1)]
            start = stop
    body, _ = body_and_head(model)
    output = body(
        input_ids=torch.from_numpy(ids).to(device),
        position_ids=torch.from_numpy(positions).to(device),
        attention_mask=_block_mask(torch.from_numpy(segment).to(device), model.dtype),
        use_cache=False,
    )
    targets = np.concatenate([trace for row in rows for trace in row.traces]).astype(np.int64)
    return output.last_hidden_state.flatten(0, 1)[torch.tensor(sources, device=device)], _tensor(targets, device)


def _block_mask(segment: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask [B, 1, L, L]: see what is earlier and of the prompt (segment 0) or of one's own segment."""
    same = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
    visible = torch.ones(segment.shape[1], segment.shape[1], dtype=torch.bool, device=segment.device).tril() & same
    mask = torch.zeros(visible.shape, dtype=dtype, device=segment.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def _read_plain(model: Any, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from one right-padded row for each trace, for models that cannot take the block mask."""
    alone = [(row.prompt_ids, trace) for row in rows for trace in row.traces]
    longest = max(len(prompt) + len(trace) for prompt, trace in alone)
    ids, mask = np.zeros((len(alone), longest), dtype=np.int64), np.zeros((len(alone), longest), dtype=np.int64)
    sources: list[int] = []
    for index, (prompt, trace) in enumerate(alone):
        stop = len(prompt) + len(trace)
        ids[index, :stop], mask[index, :stop] = np.concatenate([prompt, trace]), 1
        sources += range(index * longest + len(prompt) - 1, index * longest + stop - 1)
    body, _ = body_and_head(model)
    output = body(input_ids=_tensor(ids, model.device), attention_mask=_tensor(mask, model.device), use_cache=False)
    targets = np.concatenate([trace for _, trace in alone]).astype(np.int64)
    states = output.last_hidden_state.flatten(0, 1)
    return states[torch.tensor(sources, device=model.device)], _tensor(targets, model.device)


def _tensor(array: np.ndarray, device: Any) -> torch.Tensor:
    return torch.from_numpy(array).to(device)
