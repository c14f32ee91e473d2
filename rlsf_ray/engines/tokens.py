"""Prompts and texts as token ids, and tokens as characters: the same for every engine."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tokenizers.decoders import DecodeStream

from rlsf_ray.config_sections import ModelConfig
from rlsf_ray.engines.base import Completion, Request
from rlsf_ray.errors import InputError
from rlsf_ray.records import IntArray, Prompt

P_TRUE = "\n\nProposed answer: {answer}\n\nIs the proposed answer true or false? Reply with one word, True or False."


def asked_if_true(prompt: Prompt, answer: str) -> Prompt:
    """The prompt, with an answer proposed, as a question to be answered with True or False. P(True) 2207.05221."""
    *before, (role, content) = prompt.messages
    return replace(prompt, messages=(*before, (role, content + P_TRUE.format(answer=answer))))


def encode_prompt(tokenizer: Any, model: ModelConfig, prompt: Prompt) -> IntArray:
    """Token ids [P] of a prompt, through the model's chat template or the plain one."""
    messages = [{"role": role, "content": content} for role, content in prompt.messages]
    if model.chat == "plain":
        text = "\n".join(message["content"] for message in messages) + "\n"
        return np.asarray(tokenizer(text)["input_ids"], dtype=np.int32)
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return np.asarray(encoded["input_ids"], dtype=np.int32)


def encode_text(tokenizer: Any, text: str) -> IntArray:
    """Token ids of plain text that continues a trace (no special tokens)."""
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)


def encode_reply(tokenizer: Any, model: ModelConfig, text: str, last: int, ends: Collection[int]) -> IntArray:
    """Token ids that stand between a written turn, whose last token is `last`, and the next: `text`, said by the user.

    As the chat template has it, but for the written turn itself, which stays token by token as it was drawn, with what
    some templates drop of earlier turns, such as their thoughts. `ends`: tokens that end a turn. Raises InputError for
    a model without turns, or a template that does not hold once what a turn says.
    """
    if model.chat == "plain":
        raise InputError(
            "rollouts of several turns need a chat template, got model.chat=plain; set model.chat: template"
        )
    mark = "\u2063turn\u2063"
    messages = [("user", "?"), ("assistant", mark), ("user", text)]
    chat = [{"role": role, "content": content} for role, content in messages]
    whole = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    if (times := whole.count(mark)) != 1:
        raise InputError(
            f"the model's chat template holds what the assistant said {times} times, expected once, as rollouts of"
            " several turns need it; give the model another template"
        )
    after = whole.partition(mark)[2]
    bare = encode_text(tokenizer, after.lstrip())  # some templates have a space before the end of a turn
    if last in ends and len(bare) and int(bare[0]) in ends:
        return bare[1:]
    return encode_text(tokenizer, after)


def check_lengths(requests: Sequence[Request], context: int) -> None:
    """Raises InputError if a prompt and what may follow it do not fit the model's context."""
    longest, which = max((len(request.prompt_ids), -number) for number, request in enumerate(requests, 1))
    most = max(request.sampling.max_tokens for request in requests)
    if longest + most > context:
        raise InputError(
            f"a prompt of {longest} tokens (the {-which}. of {len(requests)}) and max_tokens={most} do not fit the"
            f" model's context of {context};"
            " shorten the prompts or lower rollout.max_tokens"
        )


def token_characters(tokenizer: Any, ids: Sequence[int]) -> tuple[str, IntArray]:
    """The text of `ids` without special tokens, and the characters [T, 2] that each token covers.

    Tokens that only together make a character (byte-level BPE) share its range; a special token covers nothing.
    """
    stream = DecodeStream(skip_special_tokens=True)
    text, waiting = "", []
    spans = np.zeros((len(ids), 2), dtype=np.int32)
    for position, token in enumerate(ids):
        chunk = stream.step(tokenizer.backend_tokenizer, token)
        waiting.append(position)
        if chunk is not None:
            spans[waiting] = (len(text), len(text) + len(chunk))
            text += chunk
            waiting = []
    spans[waiting] = (len(text), len(text))
    return text, spans


def completion(tokenizer: Any, ids: Sequence[int], values: np.ndarray, finished: bool) -> Completion:
    """What an engine returns for `ids`; `values` [T, 3]: log-prob, and the two largest probabilities."""
    text, spans = token_characters(tokenizer, ids)
    return Completion(
        token_ids=np.asarray(ids, dtype=np.int32),
        logprob=values[:, 0],
        top1=values[:, 1],
        top2=values[:, 2],
        text=text,
        char_spans=spans,
        finished=finished,
    )


def eos_ids(generation: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a text, by the model's generation config (or None) and by its tokenizer."""
    ids = generation.eos_token_id if generation is not None else None
    found = {ids} if isinstance(ids, int) else set(ids or ())
    return found | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())
