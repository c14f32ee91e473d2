"""One side of bench_end_to_end.py, in a process of its own: from prompts to trained pairs, by us or by TRL.

python benchmarks/end_to_end_sides.py JOB.json    # writes what it measured to found.json beside the job
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from end_to_end_judge import num_tokens

from rlsf_ray.config import RunConfig
from rlsf_ray.engines.lora import adapter_arrays, add_adapter, load_adapter
from rlsf_ray.engines.models import load_model, load_tokenizer
from rlsf_ray.engines.tokens import encode_prompt, eos_ids
from rlsf_ray.records import Json, Prompt
from rlsf_ray.run_store import RunStore
from rlsf_ray.tasks.sources import load_sets, prompts_of_round


def by_loop(config: RunConfig, root: str) -> dict[int, float]:
    """Run rlsf_ray.loop; returns when each round began, in unix seconds."""
    from rlsf_ray import loop

    begun: dict[int, float] = {}

    def seen(status: Json) -> None:
        if status["message"] == "generating and scoring":
            begun.setdefault(status["round"], time.time())

    loop.run(config, root, seen)
    return begun


def by_service(config: RunConfig, root: str) -> dict[int, float]:
    """Run the service on a Ray of its own; returns when each round began, in unix seconds."""
    from rlsf_ray import service

    service.run(config, root=root, run_name=f"bench-end-to-end-{os.getpid()}")
    begun: dict[int, float] = {}
    for row in RunStore.open(root).read_metrics("stages"):
        if row["stage"] == "generate":
            begun[row["round"]] = min(row["start"], begun.get(row["round"], row["start"]))
    return begun


def ours(config: RunConfig, job: Json, run: Callable[[RunConfig, str], dict[int, float]]) -> Json:
    """What a run of ours did from round `warm` on."""
    begun, counted = run(config, job["root"]), range(job["warm"], config.rounds)
    store = RunStore.open(job["root"])
    steps = store.read_metrics("train")
    pairs = [row for round in counted for row in store.read_table("pairs", round).to_pylist()]
    lengths: dict[str, list[int]] = {}
    for round in counted:
        for row in store.read_table("traces", round).select(["group_id", "token_ids"]).to_pylist():
            lengths.setdefault(row["group_id"], []).append(len(row["token_ids"]))
    found = {
        "first": min(begun.values()),
        "counted": begun[job["warm"]],
        "last": max(row["time"] for row in steps),
        "pairs": sum(row["num_examples"] for row in steps if row["round"] in counted),
        "prompts": sorted(row["prompt_id"] for row in pairs),
        "tokens": sum(map(sum, lengths.values())),
        "margin": statistics.mean(row["margin"] for row in pairs),
        "spread": statistics.mean(max(own) - min(own) for own in lengths.values()),
    }
    return found | {"stages": _stages(store) if job["stages"] else None}


def _stages(store: RunStore) -> Json:
    from bench_stages import from_run

    together: Json = from_run(store.read_metrics("stages"), store.read_json("summary.json"))
    return together


def trl(config: RunConfig, job: Json) -> Json:
    """The same by TRL's OnlineDPOTrainer, on the prompts of the same rounds one after the other."""
    train, per_round, size = load_sets(config).train, config.prompts_per_round, config.learner.pairs_per_step
    prompts = [p for r in range(config.rounds) for p in prompts_of_round(train, r, per_round, config.seed)]
    model, tokenizer = load_model(config.model), load_tokenizer(config.model)
    check_encoded(prompts, tokenizer, config)
    ends, seen = eos_ids(model.generation_config, tokenizer), list[Json]()

    def longer(prompt_id: Sequence[str], completion_ids: Sequence[Sequence[int]], **others: Any) -> list[float]:
        """The first trace of each prompt, then the second of each."""
        lengths = [num_tokens(ids, ends) for ids in completion_ids]
        half = len(lengths) // 2
        seen.append({"prompts": prompt_id[:half], "lengths": list(zip(lengths[:half], lengths[half:], strict=True))})
        return [float(length) for length in lengths]

    trainer, times = trl_trainer(config, prompts, (model, tokenizer), longer, f"{job['root']}-trl")
    trainer.train()
    margins = [row["objective/scores_margin"] for row in trainer.state.log_history if "objective/scores_margin" in row]
    warm = job["warm"] * per_round // size  # steps
    lengths = [pair for step in seen[warm:] for pair in step["lengths"]]
    return {
        "first": times[0][0],
        "counted": times[warm][0],
        "last": times[-1][1],
        "pairs": size * (trainer.state.global_step - warm),
        "prompts": sorted(prompt for step in seen[warm:] for prompt in step["prompts"]),
        "tokens": sum(map(sum, lengths)),
        "margin": statistics.mean(margins[warm:]),
        "spread": statistics.mean(abs(a - b) for a, b in lengths),
        "stages": None,
    }


def trl_trainer(
    config: RunConfig, prompts: Sequence[Prompt], parts: tuple[Any, Any], judge: Any, folder: str
) -> tuple[Any, list[list[float]]]:
    """(trainer with our first adapter, what will be the begin and end of its steps in unix seconds)."""
    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    class InOrder(OnlineDPOTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    times: list[list[float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **options: Any) -> None:
            times.append([time.time()])

        def on_step_end(self, *args: Any, **options: Any) -> None:
            times[-1].append(time.time())

    settings = config.learner
    initial = adapter_arrays(add_adapter(load_model(config.model), settings, seed=config.seed, dtype=torch.float32))
    rows = [{"prompt": [{"role": r, "content": c} for r, c in p.messages], "prompt_id": p.id} for p in prompts]
    # The adapter is made by TRL, so that the base under it is its reference model, and no copy
    lora = LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    arguments = OnlineDPOConfig(
        output_dir=folder, beta=[config.loss.beta], max_new_tokens=config.rollout.max_tokens,
        temperature=config.rollout.temperature, per_device_train_batch_size=settings.pairs_per_step,
        learning_rate=settings.learning_rate, lr_scheduler_type="constant", warmup_steps=settings.warmup_steps,
        max_grad_norm=settings.max_grad_norm, weight_decay=0.0, num_train_epochs=settings.epochs,
        gradient_checkpointing=False, bf16=False, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = InOrder(
        model=parts[0], reward_funcs=judge, args=arguments, train_dataset=Dataset.from_list(rows),
        processing_class=parts[1], peft_config=lora, callbacks=[Clock()],
    )  # fmt: skip
    load_adapter(trainer.model, initial)
    return trainer, times


def check_encoded(prompts: Sequence[Prompt], tokenizer: Any, config: RunConfig) -> None:
    """Exit if TRL makes other tokens of a prompt than we do."""
    from trl.data_utils import apply_chat_template

    for prompt in prompts:
        messages = [{"role": role, "content": content} for role, content in prompt.messages]
        text = apply_chat_template({"prompt": messages}, tokenizer)["prompt"]
        theirs, own = (
            tokenizer(text, add_special_tokens=False)["input_ids"],
            encode_prompt(tokenizer, config.model, prompt),
        )
        if theirs != own.tolist():
            sys.exit(f"prompt {prompt.id}: TRL reads the tokens {theirs}, expected {own.tolist()}; take another model")


def main() -> None:
    """Run the job's side."""
    file = Path(sys.argv[1])
    job = json.loads(file.read_text())
    config = RunConfig.model_validate(job["config"])
    if job["side"] == "trl":
        torch.set_num_threads(os.cpu_count() or 1)
        found = trl(config, job)
    else:
        found = ours(config, job, by_loop if job["side"] == "loop" else by_service)
    file.with_name("found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
