"""Chat templates that rewrite what was said: the tokens of a turn stay where they were drawn, or the fault is named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_config

from rlsf_ray.engines.base import Completion, Request
from rlsf_ray.engines.tokens import completion, encode_prompt
from rlsf_ray.engines.transformers_engine import TransformersEngine
from rlsf_ray.errors import InputError
from rlsf_ray.records import Check, Group, Prompt
from rlsf_ray.rollouts.programs import write_groups
from rlsf_ray.rollouts.several import REFLECT, RETRY

DROPS_THOUGHTS = (  # of every turn that a reply follows, as Qwen3's template does
    "{% for m in messages %}{% set text = m['content'] %}{% if m['role'] == 'assistant' and not loop.last %}"
    "{% set text = text.split('</think>')[-1] %}{% endif %}<|{{ m['role'] }}|>{{ text }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Thinking(TransformersEngine):
    """Writes what a script says, a text for each call, and notes the first request of each."""

    script: Iterator[str]
    asked: list[Request]

    def generate(self, requests: Sequence[Request], version: int) -> list[list[Completion]]:
        self.asked.append(requests[0])
        ids = [*self.encode_text(next(self.script)), self._tokenizer.eos_token_id]
        return [[completion(self._tokenizer, ids, np.full((len(ids), 3), -0.5, np.float32), True)] for _ in requests]


def thinking(tiny: Path, template: str, texts: Sequence[str]) -> tuple[Thinking, Group]:
    """(the engine, what it has written) with this chat template."""
    config = tiny_config(tiny, signal="passed", rollout={"name": "reflect_retry", "traces": 2, "max_tokens": 8})
    made = Thinking(config.model, config.learner, threads=1)
    made._tokenizer.chat_template, made.script, made.asked = template, iter(texts), []
    check = Check(kind="countdown", data={"numbers": [1, 2], "target": 1000})
    prompt = Prompt(id="p", messages=(("user", "3 + 4 ="),), task="t", key="3+4", check=check)
    (group,) = write_groups(made, [prompt], config=config, round=0, first_sequence=0, version=0)
    return made, group


def test_a_template_that_rewrites_earlier_turns_moves_no_token(tiny: Path) -> None:
    """A written turn stays as it was drawn, thought and all: credit falls on its tokens and on no other."""
    texts = ["<think>3 and 0</think>It is 4", "<think>hm</think>I was wrong.", "<think>so</think>It is 5"]
    engine, group = thinking(tiny, DROPS_THOUGHTS, texts)
    tokenizer, trace = engine._tokenizer, group.traces[0]
    talk = [
        *group.prompt.messages,
        ("assistant", texts[0]),
        ("user", REFLECT),
        ("assistant", texts[1]),
        ("user", RETRY),
    ]
    kept = "".join(f"<|{role}|>{text}<|end|>" for role, text in [*talk, ("assistant", texts[2])])
    assert tokenizer.decode([*group.prompt_ids, *trace.token_ids]) == kept
    asked = Prompt(id="", messages=tuple(talk), task="t", key="")
    rewritten = tokenizer.decode(encode_prompt(tokenizer, tiny_config(tiny).model, asked))
    assert "<think>" not in rewritten  # so a mask made of the template's text would lie elsewhere
    for turn, text, request in zip(trace.turns, texts, engine.asked, strict=True):
        begin, end = turn.tokens
        assert tokenizer.decode(trace.token_ids[begin:end]) == f"{text}<|end|>"
        assert np.flatnonzero(trace.written([turn.role])).tolist() == list(range(begin, end))
        np.testing.assert_array_equal(request.prompt_ids, [*group.prompt_ids, *trace.token_ids[:begin]])
    said = tokenizer.decode(trace.token_ids[~trace.written()])
    assert said == f"<|user|>{REFLECT}<|end|><|assistant|><|user|>{RETRY}<|end|><|assistant|>"


def one_line(turn: str) -> str:
    """A chat template whose turns look so."""
    return f"{{% for m in messages %}}{turn}{{% endfor %}}{{% if add_generation_prompt %}}<|assistant|>{{% endif %}}"


def test_a_turn_that_has_ended_is_not_ended_again_after_a_space(tiny: Path) -> None:
    """Llama 2's template has spaces around what a turn says."""
    template = one_line("<|{{ m['role'] }}|> {{ m['content'] }} <|end|>")
    engine, group = thinking(tiny, template, ["It is 4", "I was wrong.", "It is 5"])
    trace = group.traces[0]
    between = engine._tokenizer.decode(trace.token_ids[trace.turns[0].tokens[1] : trace.turns[1].tokens[0]])
    assert between == f"<|user|> {REFLECT} <|end|><|assistant|>"


@pytest.mark.parametrize(
    ("said", "times"),
    [("{{ m['content'] }}{{ m['content'] }}", 2), ("{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}", 0)],
)
def test_a_template_that_does_not_hold_a_turn_once_is_refused(said: str, times: int, tiny: Path) -> None:
    with pytest.raises(InputError, match=f"what the assistant said {times} times"):
        thinking(tiny, one_line(f"<|{{{{ m['role'] }}}}|>{said}<|end|>"), ["It is 4"])
