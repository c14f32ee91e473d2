"""The prompts a model fails, found before a run that learns from failures: others cost attempts and teach nothing.

Reflect, Retry, Reward 2505.24726, section 3: several samples of each prompt, and only those that fail are kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import numpy as np

from rlsf_ray.config import RunConfig
from rlsf_ray.engines.build import build_engine
from rlsf_ray.errors import InputError
from rlsf_ray.records import Group, Json
from rlsf_ray.rollouts.several import attempts, write_talks
from rlsf_ray.tasks.sources import load_sets


def find_failures(
    config: RunConfig, to: Path, *, most: float, on_batch: Callable[[int, int, int], None] = lambda *_: None
) -> tuple[int, int]:
    """Write the training prompts of which at most the share `most` of `rollout.traces` samples pass, as JSON Lines.

    `to` is then a source: {kind: file, path: to, messages: messages, check: check}. Every prompt that has been judged
    stands in `<to>.judged` at once, so the same call goes on after an interruption. Samples whose check could not be
    made do not count. `data.suffix` stands in the messages already. Returns (kept, judged). `on_batch`: (judged, of,
    kept).
    """
    judged_file = to.with_name(to.name + ".judged")
    judged_file.parent.mkdir(parents=True, exist_ok=True)
    config = config.model_copy(  # samples that differ, whatever the recipe does with attempts
        update={"rollout": config.rollout.model_copy(update={"uncredited_temperature": None})}
    )
    prompts = load_sets(config).train
    rows = _known(judged_file, config, {prompt.id for prompt in prompts})
    left = [prompt for prompt in prompts if prompt.id not in {row["id"] for row in rows}]
    if left:
        with closing(build_engine(config)) as engine, judged_file.open("a") as file:
            size = config.cluster.prompts_per_call
            for start in range(0, len(left), size):
                batch = left[start : start + size]
                numbers = range(len(rows), len(rows) + len(batch))
                found = write_talks(attempts, engine, batch, config=config, round=-1, sequences=numbers, version=0)
                new = [_row(group) for group in found]
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in new))
                file.flush()
                rows += new
                on_batch(len(rows), len(prompts), len(_failed(rows, most)))
    kept = _failed(rows, most)
    to.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    return len(kept), len(rows)


def _failed(rows: Sequence[Json], most: float) -> list[Json]:
    return [row for row in rows if row["passed"] is not None and row["passed"] <= most]


def _row(group: Group) -> Json:
    prompt = group.prompt
    checked = [trace.turns[0].passed for trace in group.traces if not math.isnan(trace.turns[0].passed)]
    return {
        "id": prompt.id,
        "messages": [{"role": role, "content": content} for role, content in prompt.messages],
        "check": asdict(prompt.check) if prompt.check else None,
        "passed": float(np.mean(checked)) if checked else None,  # of those that could be checked
        "samples": len(group.traces),
    }


def _known(path: Path, config: RunConfig, prompts: Collection[str]) -> list[Json]:
    """What an earlier call has judged of these prompts; a last line that was cut short is taken off the file.

    Raises InputError if that call had other settings.
    """
    ours = {"model": config.model.model_dump(), "rollout": config.rollout.model_dump(), "seed": config.seed}
    if not path.exists():
        path.write_text(json.dumps(ours) + "\n")
    whole, _, rest = path.read_text().rpartition("\n")
    head, *lines = [json.loads(line) for line in whole.split("\n")]
    if rest:
        path.write_text(whole + "\n")
    if odd := [key for key in ours if head.get(key) != ours[key]]:
        raise InputError(
            f"{path} was judged with another {odd[0]}: expected {head.get(odd[0])}, got {ours[odd[0]]}; give the same"
            " settings, or another --to"
        )
    return [row for row in lines if row["id"] in prompts]
