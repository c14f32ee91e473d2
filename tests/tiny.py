"""A tiny random model with a real byte-level BPE tokenizer and chat template, and a config that uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlsf_ray.config import RunConfig

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = [f"{a} + {b} = {a + b}. The answer is {a + b}." for a in range(30) for b in range(30)]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", chat_template=CHAT
    )


def tiny_model(folder: Path, *, seed: int = 0, steps: int = 120) -> Path:
    """Save a two-layer Llama in float32 with its tokenizer, taught for two seconds to end its answers with a number."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=True,
        )
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    _teach(model, tokenizer, steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _teach(model: Any, tokenizer: Any, steps: int) -> None:
    """A few steps on one-digit sums: enough to answer in the right form, not enough to be right or sure."""
    import numpy as np
    import torch

    draw, optimizer = np.random.default_rng(0), torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        rows = []
        for a, b in draw.integers(0, 10, (32, 2)).tolist():
            messages = [{"role": "user", "content": f"State the final answer: {a} + {b} ="}]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            rows.append(f"{text}The answer is {a + b}.<|end|>")
        batch = tokenizer(rows, return_tensors="pt", padding=True, add_special_tokens=False)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def tiny_config(model: Path, **changes: Any) -> RunConfig:
    """Two rounds of eight sums over the tiny model, with pairs for nearly every prompt (random rule)."""
    settings: dict[str, Any] = {
        "recipe": "tiny",
        "rounds": 2,
        "prompts_per_round": 8,
        "model": {"name": str(model), "dtype": "float32"},
        "data": {
            "train": [
                {
                    "name": "chain_sum",
                    "count": 16,
                    "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
                }
            ],
            "probe": [
                {
                    "name": "chain_sum",
                    "count": 6,
                    "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
                }
            ],
            "answer": "number",
        },
        "rollout": {"traces": 4, "max_tokens": 12, "temperature": 1.0},
        "pairs": {"rule": "random", "max_pairs": 2},
        "learner": {"lora_rank": 4, "lora_alpha": 8, "learning_rate": 1e-3, "epochs": 2, "pairs_per_step": 4},
        "cluster": {
            "prompts_per_call": 4,
            "generators": {"cpus": 1, "threads": 1},
            "scorers": {"threads": 1},
            "trainers": {"cpus": 1, "threads": 1},
            "deadline_s": 180,
        },
        "eval": {"samples": 2},
    }
    if "advantages" in changes and "reward_model" not in changes:
        del settings["pairs"]
    return RunConfig.model_validate(_merge(settings, changes))


_SUMS = {
    "name": "chain_sum",
    "count": 96,
    "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
}
WATCHED: dict[str, Any] = {"data": {"calibration": 20, "train": [_SUMS]}}  # as many as the guard needs to stop a run


def collapsing(model: Path, **changes: Any) -> RunConfig:
    """A run whose first version writes noise, with calibration prompts for the guard to see it by."""
    return tiny_config(model, **_merge(WATCHED | {"learner": {"learning_rate": 2.0}}, changes))


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
