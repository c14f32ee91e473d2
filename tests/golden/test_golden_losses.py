"""Five optimiser steps on fixed tokens give the committed losses: a change that should not move numbers does not.

Regenerate, with the reason in the commit message:  python tests/golden/test_golden_losses.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the regenerate command; pytest has it already

from tiny import tiny_config, tiny_model

from rlsf_ray.engines.learner import Learner
from rlsf_ray.engines.steps import StepSize, training_steps
from rlsf_ray.records import Pair, TrainingGroup, TrainingTrace

GOLDEN = Path(__file__).with_name("losses.json")
SETTINGS = {
    "dpo": {"name": "dpo", "beta": 0.1, "nll": 0.2},
    "dpo_smoothed": {"name": "dpo", "beta": 0.2, "label_smoothing": 0.01, "nll": 0.0},
    "ipo": {"name": "ipo", "beta": 0.2, "nll": 0.0},
}


def groups() -> list[TrainingGroup]:
    draw = np.random.default_rng(7)
    made = []
    for index in range(10):
        lengths = draw.integers(3, 9, 4)
        traces = tuple(
            TrainingTrace(
                id=f"{index}/{k}",
                seed=k,
                version=0,
                score=0.0,
                answer=None,
                token_ids=draw.integers(4, 300, length).astype(np.int32),
                logprob=np.full(length, -5.0, dtype=np.float32),
                reference_logprob=draw.normal(-5.0, 0.5, length).astype(np.float32),
            )
            for k, length in enumerate(lengths)
        )
        made.append(
            TrainingGroup(
                id=str(index),
                round=0,
                sequence=index,
                prompt_id=str(index),
                signal="disparity",
                prompt_ids=draw.integers(4, 300, 7).astype(np.int32),
                traces=traces,
                pairs=(Pair(chosen=0, rejected=1), Pair(chosen=2, rejected=3, weight=1.5)),
            )
        )
    return made


def losses(folder: Path) -> dict[str, list[float]]:
    """The mean loss of each of five steps, for each loss, on an untaught tiny model."""
    model = tiny_model(folder, steps=0)
    found = {}
    for name, loss in SETTINGS.items():
        learner = Learner(tiny_config(model, loss=loss, learner={"learning_rate": 1e-2, "warmup_steps": 2}))
        found[name] = [
            learner.train_step(step, size=StepSize(4, 0), round=0, pass_index=0).means()["loss"]
            for step in training_steps(groups(), 4)
        ]
    return found


def test_losses_are_the_committed_ones(tmp_path: Path) -> None:
    expected = json.loads(GOLDEN.read_text())
    found = losses(tmp_path)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert len(values) == 5
        assert found[name] == pytest.approx(values, rel=1e-4), name


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps(losses(Path(folder)), indent=1) + "\n")
    print(GOLDEN.read_text())
