"""One side of bench_learner.py, in a process of its own: the same groups through our learner or through TRL's trainer.

python benchmarks/learner_sides.py ours|trl JOB.json    # prints what it measured as JSON
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from rlsf_ray.config import RunConfig
from rlsf_ray.engines.learner import Learner
from rlsf_ray.engines.lora import adapter_arrays, add_adapter, sum_at_once
from rlsf_ray.engines.models import load_model, load_tokenizer
from rlsf_ray.engines.objectives import rows_of
from rlsf_ray.engines.packing import in_passes, trace_logprobs
from rlsf_ray.engines.steps import StepSize, training_steps
from rlsf_ray.records import Json, TrainingGroup
from rlsf_ray.tables import decode, row_to_group

MICRO = 8  # pairs, or traces, in one of TRL's passes


class Clock:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began


def read_groups(path: str) -> list[TrainingGroup]:
    return [row_to_group(row) for row in decode(Path(path).read_bytes()).to_pylist()]


def references(model: Any, groups: Sequence[TrainingGroup], max_tokens: int) -> list[list[np.ndarray]]:
    """The log-probs [T] of every trace by the model as it is, for each group."""
    with torch.no_grad():
        found = [row for part in in_passes(rows_of(groups), max_tokens) for row in trace_logprobs(model, part)]
    return [[values.float().numpy() for values in row] for row in found]


def margins(model: Any, groups: Sequence[TrainingGroup], max_tokens: int) -> list[float]:
    """log p(chosen) - log p(rejected) of every pair."""
    read = zip(groups, references(model, groups, max_tokens), strict=True)
    return [float(row[p.chosen].sum() - row[p.rejected].sum()) for group, row in read for p in group.pairs]


def ours(config: RunConfig, groups: Sequence[TrainingGroup], clock: Clock) -> tuple[Any, list[float]]:
    """(model with the trained adapter, the loss of each step)."""
    learner = Learner(config)
    with clock.of("reference"):  # the adapter adds nothing yet
        found = references(learner._model, groups, config.learner.max_tokens_per_pass)
    if not config.advantages:
        groups = [_with_references(group, row) for group, row in zip(groups, found, strict=True)]
    losses = []
    with clock.of("train"):
        for step in training_steps(groups, config.examples_per_step(0)):
            report = learner.train_step(step, size=StepSize.of(step), round=0, pass_index=0)
            losses.append(report.sums["loss"] / report.num_examples)
    return learner._model, losses


def _with_references(group: TrainingGroup, found: Sequence[np.ndarray]) -> TrainingGroup:
    traces = zip(group.traces, found, strict=True)
    return replace(group, traces=tuple(replace(trace, reference_logprob=values) for trace, values in traces))


def trl_model(config: RunConfig) -> Any:
    """The same model with the same adapter, as PEFT computes it."""
    model = add_adapter(load_model(config.model), config.learner, seed=config.seed, dtype=torch.float32)
    sum_at_once(model, at_once=False)
    return model


def trl_dpo(config: RunConfig, groups: Sequence[TrainingGroup], clock: Clock) -> tuple[Any, list[float]]:
    """The same by TRL's DPOTrainer, with reference log-probs made before, in the order of our steps."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import DPOConfig, DPOTrainer

    class FromIds(DPOTrainer):
        """Takes token ids, keeps their order, and tells how long the reference log-probs take."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **options: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *args: Any, **options: Any) -> Any:
            with clock.of("reference"):
                return super()._precompute_ref_logps(*args, **options)

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    def row(group: TrainingGroup, pair: Any) -> Json:
        sides = {"chosen_ids": group.traces[pair.chosen], "rejected_ids": group.traces[pair.rejected]}
        return {"prompt_ids": group.prompt_ids.tolist()} | {n: t.token_ids.tolist() for n, t in sides.items()}

    rows = [row(group, pair) for group in groups for pair in group.pairs]
    settings = config.learner
    micro = math.gcd(MICRO, settings.pairs_per_step)
    arguments = DPOConfig(
        output_dir=str(Path(sys.argv[2]).parent / "trl"), loss_type=["sigmoid"], beta=config.loss.beta,
        per_device_train_batch_size=micro, gradient_accumulation_steps=settings.pairs_per_step // micro,
        learning_rate=settings.learning_rate, lr_scheduler_type="constant", warmup_steps=settings.warmup_steps,
        max_grad_norm=settings.max_grad_norm, weight_decay=0.0, num_train_epochs=1, max_length=None,
        precompute_ref_log_probs=True, gradient_checkpointing=False, bf16=False, report_to=[], save_strategy="no",
        logging_steps=1, disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = FromIds(
        model=trl_model(config), args=arguments, train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(config.model),
    )  # fmt: skip
    with clock.of("train"):
        trainer.train()
    return trainer.model, [float(found["loss"]) for found in trainer.state.log_history if "loss" in found]


def trl_grpo(config: RunConfig, groups: Sequence[TrainingGroup], clock: Clock) -> tuple[Any, list[float]]:
    """The loss of TRL's GRPOTrainer on the same traces, in the order of our steps; its generation is left out."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    assert config.advantages is not None
    size, limit = config.advantages.traces_per_step, config.rollout.max_tokens
    arguments = GRPOConfig(
        output_dir=str(Path(sys.argv[2]).parent / "trl"), loss_type="grpo", beta=config.advantages.kl,
        per_device_train_batch_size=MICRO, num_generations=MICRO, epsilon=config.advantages.clip,
        epsilon_high=config.advantages.clip_high, temperature=config.rollout.temperature, max_completion_length=limit,
        gradient_checkpointing=False, bf16=False, report_to=[], use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=trl_model(config), reward_funcs=lambda completions, **_: [0.0] * len(completions), args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["1 + 1 ="]}), processing_class=load_tokenizer(config.model),
    )  # fmt: skip
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learner.learning_rate, weight_decay=0.0)
    traces = [(group.prompt_ids, trace) for group in groups for trace in group.traces]
    trainer.current_gradient_accumulation_steps = 1  # the parts of a step are weighed below
    losses = []
    with clock.of("train"):
        for first in range(0, len(traces), size):
            step = traces[first : first + size]
            optimizer.zero_grad()
            total = 0.0
            for start in range(0, len(step), MICRO):
                part = step[start : start + MICRO]
                loss = trainer._compute_loss(trainer.model, grpo_inputs(part)) * len(part) / len(step)
                loss.backward()
                total += float(loss.detach())
            torch.nn.utils.clip_grad_norm_(parameters, config.learner.max_grad_norm)
            optimizer.step()
            losses.append(total)
    return trainer.model, losses


def grpo_inputs(traces: Sequence[tuple[np.ndarray, Any]]) -> Json:
    """What GRPOTrainer's loss reads of (prompt, trace)s, padded as it pads them."""

    def padded(rows: Sequence[np.ndarray], *, left: bool, dtype: Any) -> tuple[torch.Tensor, torch.Tensor]:
        size = max(map(len, rows))
        values, mask = np.zeros((len(rows), size), dtype), np.zeros((len(rows), size), np.int64)
        for row, given in enumerate(rows):
            place = slice(size - len(given), size) if left else slice(0, len(given))
            values[row, place], mask[row, place] = given, 1
        return torch.from_numpy(values), torch.from_numpy(mask)

    prompt_ids, prompt_mask = padded([prompt for prompt, _ in traces], left=True, dtype=np.int64)
    ids, mask = padded([trace.token_ids for _, trace in traces], left=False, dtype=np.int64)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": torch.tensor([float(trace.credit[0]) for _, trace in traces]),
        "old_per_token_logps": padded([t.logprob for _, t in traces], left=False, dtype=np.float32)[0],
        "ref_per_token_logps": padded([t.reference_logprob for _, t in traces], left=False, dtype=np.float32)[0],
        "num_items_in_batch": mask.sum(),
    }


def main() -> None:
    """Measure one side of the job, keep its adapter beside the job."""
    side, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    config = RunConfig.model_validate(job["config"])
    groups, held_out, clock = read_groups(job["groups"]), read_groups(job["held_out"]), Clock()
    torch.set_num_threads(job["threads"])
    theirs = trl_grpo if config.advantages else trl_dpo
    model, losses = (ours if side == "ours" else theirs)(config, groups, clock)
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    adapter = Path(sys.argv[2]).with_name(f"{side}.safetensors")
    save_file(adapter_arrays(model), adapter)
    model.eval()
    found = {
        "seconds": clock.seconds,
        "peak_gb": peak_gb,
        "losses": losses,
        "margins": margins(model, held_out, config.learner.max_tokens_per_pass),
        "adapter": str(adapter),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
