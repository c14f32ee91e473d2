"""Training of a LoRA adapter: groups in, optimiser steps out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from safetensors.torch import load, save

from rlsf_ray.config import RunConfig
from rlsf_ray.engines.lora import (
    adapter_arrays,
    add_adapter,
    add_reward_head,
    check_logits,
    load_adapter,
    sum_at_once,
    sums_at_once,
)
from rlsf_ray.engines.models import load_model
from rlsf_ray.engines.objectives import GAP_SQUARES, GAP_TOKENS, BradleyTerry, Objective, objective_of
from rlsf_ray.engines.packing import read_texts
from rlsf_ray.engines.steps import StepSize, passes
from rlsf_ray.errors import NonFiniteLossError
from rlsf_ray.records import Canary, FloatArray, IntArray, StepReport, TrainingGroup

CANARIES, CANARY_CANDIDATES = 16, 32  # traces that prove a version, chosen among so many
AllReduce = Callable[[list[torch.Tensor]], None]  # sums each tensor over the workers, in place


class Learner:
    """The adapter being trained and its optimiser. The frozen base model under it is the reference policy.

    `reward`: what is trained is a reward model, an adapter of its own with a scalar head. `steps_before`: how many
    steps the run has made with such a one before this; the learning rate warms up anew.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        reward: bool = False,
        steps_before: int = 0,
        threads: int = 0,
        device: str | None = None,
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._config = config
        base = load_model(config.model, device=device)
        check_logits(base)
        self._model = add_adapter(base, config.learner, seed=config.seed, dtype=torch.float32)
        self._objective: Objective = objective_of(config)
        self._rate = config.learner.learning_rate
        if reward and config.reward_model:
            add_reward_head(self._model)
            self._objective, self._rate = BradleyTerry(), config.reward_model.learning_rate
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=self._rate, weight_decay=0.0)
        self._step, self._steps_before = 0, steps_before

    @property
    def steps(self) -> int:
        """Steps of the run so far."""
        return self._steps_before + self._step

    def train_step(
        self,
        groups: Sequence[TrainingGroup],
        *,
        size: StepSize,
        round: int,
        pass_index: int,
        newest: int = 0,
        all_reduce: AllReduce | None = None,
    ) -> StepReport:
        """One optimiser step on `groups`, this worker's share of a step of that size.

        `newest`: the version that is trained on. Raises NonFiniteLossError, before the weights are touched, if loss or
        gradient is nan or inf.
        """
        self._optimizer.zero_grad(set_to_none=False)
        sums: dict[str, float] = {}
        for batch in passes(groups, self._config.learner.max_tokens_per_pass):
            loss, values = self._objective(self._model, batch, size, newest)
            (loss / size.examples).backward()
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value
        if all_reduce is not None:
            sums = self._reduce(sums, all_reduce)
        return self._apply(groups, sums, size.examples, round, pass_index)

    def _reduce(self, sums: dict[str, float], all_reduce: AllReduce) -> dict[str, float]:
        names = self._objective.names
        values = torch.tensor([sums.get(name, 0.0) for name in names], dtype=torch.float64)
        for parameter in self._parameters:
            if parameter.grad is None:  # a worker whose share of the step was empty
                parameter.grad = torch.zeros_like(parameter)
        all_reduce([parameter.grad for parameter in self._parameters if parameter.grad is not None])
        all_reduce([values])
        return dict(zip(names, values.tolist(), strict=True))

    def _apply(
        self, groups: Sequence[TrainingGroup], sums: dict[str, float], examples: int, round: int, pass_index: int
    ) -> StepReport:
        settings = self._config.learner
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, settings.max_grad_norm))
        if not np.isfinite(sums["loss"]) or not np.isfinite(norm):
            raise NonFiniteLossError(
                f"round {round}, step {self.steps}: loss {sums['loss']}, gradient norm {norm}, expected finite numbers;"
                f" groups {[group.id for group in groups]}; lower learner.learning_rate or use model.dtype=float32"
            )
        rate = self._rate * min(1.0, (self._step + 1) / max(1, settings.warmup_steps))
        for options in self._optimizer.param_groups:
            options["lr"] = rate
        self._optimizer.step()
        self._step += 1
        gap = (sums.pop(GAP_SQUARES, 0.0) / max(1.0, sums.pop(GAP_TOKENS, 0.0))) ** 0.5
        return StepReport(
            round=round,
            step=self.steps,
            pass_index=pass_index,
            num_examples=examples,
            sums=sums,
            grad_norm=norm,
            learning_rate=rate,
            logprob_gap=gap,
        )

    def canaries(self, groups: Sequence[TrainingGroup], before: Mapping[str, np.ndarray]) -> list[Canary]:
        """The traces of `groups` whose log-probs moved most from the adapter `before` to the one held now."""
        # Without the last token: to read a text, an engine needs room for one token after it
        traces = [(group.prompt_ids, trace.token_ids[:-1]) for group in groups for trace in group.traces]
        traces = [text for text in traces if len(text[1])]
        if not traces:
            return []
        spread = np.unique(np.linspace(0, len(traces) - 1, CANARY_CANDIDATES).astype(int))  # over the whole round
        texts = [traces[index] for index in spread]
        now, new = self.adapter(), self.logprobs(texts, like_generators=True)
        self.set_adapter(before)
        try:
            old = self.logprobs(texts, like_generators=True)
        finally:
            self.set_adapter(now)
        moved = sorted(range(len(texts)), key=lambda i: -float(np.square(new[i] - old[i]).mean()))
        return [
            Canary(prompt_ids=texts[i][0], token_ids=texts[i][1], before=old[i], after=new[i]) for i in moved[:CANARIES]
        ]

    def logprobs(
        self, texts: Sequence[tuple[IntArray, IntArray]], *, like_generators: bool = False
    ) -> list[FloatArray]:
        """For each (prompt ids, trace ids): the log-probs [T] of the trace's tokens with the adapter held now.

        `like_generators`: base and adapter are rounded as the generators do it, which may be worse than we do.
        """
        sum_at_once(self._model, at_once=not like_generators or sums_at_once(self._config))
        try:
            return read_texts(self._model, texts, self._config.learner.max_tokens_per_pass)
        finally:
            sum_at_once(self._model, at_once=True)

    def set_adapter(self, adapter: Mapping[str, np.ndarray]) -> None:
        """Hold `adapter` from now on. Raises WeightsError for one of another shape."""
        load_adapter(self._model, adapter)

    def adapter(self) -> dict[str, np.ndarray]:
        """The adapter as float32 arrays under PEFT's names."""
        return adapter_arrays(self._model)

    def state_bytes(self) -> bytes:
        """Everything a restart needs (adapter, optimiser moments, step count) as one safetensors file."""
        tensors = {f"adapter/{name}": torch.from_numpy(array) for name, array in self.adapter().items()}
        for index, moments in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{name}": value for name, value in moments.items()}
        return save(tensors | {"step": torch.tensor(self._step), "steps_before": torch.tensor(self._steps_before)})

    def load_state_bytes(self, state: bytes) -> None:
        """Go on from what `state_bytes` gave. Raises WeightsError for an adapter of another shape."""
        tensors = load(state)
        adapter = {n.removeprefix("adapter/"): t.numpy() for n, t in tensors.items() if n.startswith("adapter/")}
        self.set_adapter(adapter)
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer/"):
                _, index, moment = name.split("/")
                moments.setdefault(int(index), {})[moment] = tensor
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self._step, self._steps_before = int(tensors["step"]), int(tensors.get("steps_before", 0))


def steps_in(state: bytes) -> int:
    """Steps of the run that a learner had made when it gave `state`."""
    tensors = load(state)
    return int(tensors["step"]) + int(tensors.get("steps_before", 0))
