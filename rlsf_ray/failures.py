"""The prompts a model fails, found before a run that learns from failures: others cost attempts and teach nothing.

Reflect, Retry, Reward 2505.24726, section 3: several samples of each prompt, and only those that fail are kept.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from rlsf_ray.config import RunConfig
from rlsf_ray.engines.build import build_engine
from rlsf_ray.errors import InputError
from rlsf_ray.records import Group, Json, Prompt
from rlsf_ray.rollouts.desk import turn_sampling
from rlsf_ray.rollouts.several import attempts, write_talks
from rlsf_ray.tasks.questions import with_suffix
from rlsf_ray.tasks.sources import load_sets

_COLUMNS = {"id", "asked", "messages", "passed", "samples"}


def find_failures(
    config: RunConfig, to: Path, *, most: float, on_batch: Callable[[int, int, int], None] = lambda *_: None
) -> tuple[int, int]:
    """Write the training prompts that the untrained model fails as JSON Lines, each as its source has it.

    An attempt is drawn as the run of this config draws its own. Where that is sampled there are `rollout.traces` of
    each prompt, as in the paper (up to 64), and a prompt is kept if at most the share `most` passes. Where it is greedy
    there is one, and a prompt is kept if it fails. Attempts whose check could not be made do not count.

    `to` is then a source for the same config: {kind: file, path: to, messages: messages, id: id, check: check}, with
    `labels: true` if the checks are labels. Without `check` where `rollout.check` judged prompts that have none.
    Every prompt that has been judged stands in `<to>.judged` at once, so the same call goes on after an interruption;
    one whose messages, check or answer format has changed since is judged anew. Returns (kept, judged). `on_batch`:
    (judged, of, kept). Raises InputError: `most` not in [0, 1), prompts without a check, files that are not ours.
    """
    if not 0.0 <= most < 1.0:
        raise InputError(
            f"--most is {most}, expected a share of at least 0 and below 1 (at 1 prompts that always pass would be kept"
            " too); lower it"
        )
    judged_file = to.with_name(to.name + ".judged")
    if to.exists() and not judged_file.exists():
        raise InputError(f"--to {to} is there, and no earlier call's: {judged_file} is missing; give a new file")
    bare, asked = _prompts(config)
    judged_on = {prompt.id: _fingerprint(prompt) for prompt in asked}
    judged_file.parent.mkdir(parents=True, exist_ok=True)
    rows = _known(judged_file, config, judged_on)
    left = [n for n, prompt in enumerate(asked) if prompt.id not in rows]
    if left:
        with closing(build_engine(config)) as engine, judged_file.open("a", encoding="utf-8") as file:
            size = config.cluster.prompts_per_call
            for start in range(0, len(left), size):
                batch = left[start : start + size]
                prompts = [asked[n] for n in batch]
                found = write_talks(attempts, engine, prompts, config=config, round=-1, sequences=batch, version=0)
                new = [_row(bare[n], group, judged_on) for n, group in zip(batch, found, strict=True)]
                file.write(_lines(new))
                file.flush()
                rows |= {row["id"]: row for row in new}
                on_batch(len(rows), len(asked), len(_failed(list(rows.values()), most)))
    kept = _failed([rows[prompt.id] for prompt in asked], most)
    half_made = to.with_name(to.name + ".tmp")
    half_made.write_text(_lines(kept), encoding="utf-8")
    half_made.replace(to)
    return len(kept), len(rows)


def _prompts(config: RunConfig) -> tuple[list[Prompt], list[Prompt]]:
    """The training prompts as their sources have them, and with `data.suffix`, as they are asked.

    Raises InputError if some cannot be judged.
    """
    plain = config.model_copy(update={"data": config.data.model_copy(update={"suffix": ""})})
    bare = load_sets(plain).train
    unchecked = [prompt.id for prompt in bare if prompt.check is None]
    if unchecked and config.rollout.check == "task":
        raise InputError(
            f"{len(unchecked)} of {len(bare)} training prompts, such as {unchecked[0]}, have no check, so whether the"
            " model fails them cannot be told; name the column of checks in their source (check: COLUMN), leave the"
            " source out, or set rollout.check: majority"
        )
    return bare, [replace(prompt, messages=with_suffix(prompt.messages, config.data.suffix)) for prompt in bare]


def _fingerprint(prompt: Prompt) -> str:
    """Of all that a verdict on the prompt depends on."""
    check = asdict(prompt.check) if prompt.check else None
    text = json.dumps([prompt.messages, check, prompt.answer_format], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _failed(rows: Sequence[Json], most: float) -> list[Json]:
    return [row for row in rows if row["passed"] is not None and row["passed"] <= most]


def _row(bare: Prompt, group: Group, judged_on: Mapping[str, str]) -> Json:
    checked = [trace.turns[0].passed for trace in group.traces if not math.isnan(trace.turns[0].passed)]
    return {
        "id": bare.id,
        "asked": judged_on[bare.id],
        "messages": [{"role": role, "content": content} for role, content in bare.messages],
        **({"check": asdict(bare.check)} if bare.check else {}),
        "passed": float(np.mean(checked)) if checked else None,  # of those that could be checked
        "samples": len(group.traces),
    }


def _lines(rows: Sequence[Json]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _known(path: Path, config: RunConfig, judged_on: Mapping[str, str]) -> dict[str, Json]:
    """What an earlier call has judged of prompts that are still the same; a last line that was cut short is cut off.

    A file that is new, or was cut short in its first line, is begun. Raises InputError if that call had other
    settings, or the file is none of ours.
    """
    ours = {
        "model": config.model.model_dump(mode="json"),
        "rollout": config.rollout.model_dump(mode="json"),
        "seed": config.seed,
        "attempt": asdict(turn_sampling(config, "attempt")),
    }
    head = json.dumps(ours).encode() + b"\n"
    found = path.read_bytes() if path.exists() else b""
    if head.startswith(found):
        path.write_bytes(head)
        return {}
    whole, _, rest = found.rpartition(b"\n")
    first, *rows = [
        _read(path, number, line, set(ours) if number == 1 else _COLUMNS)
        for number, line in enumerate(whole.split(b"\n"), start=1)
    ]
    if odd := [key for key in ours if first[key] != ours[key]]:
        raise InputError(
            f"{path} was judged with another {odd[0]}: expected {first[odd[0]]}, got {ours[odd[0]]}; give the same"
            " settings, or another --to"
        )
    if rest:
        os.truncate(path, len(whole) + 1)
    return {row["id"]: row for row in rows if judged_on.get(row["id"]) == row["asked"]}


def _read(path: Path, number: int, line: bytes, keys: set[str]) -> Json:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if isinstance(row, dict) and keys <= row.keys():
        return row
    raise InputError(
        f"{path}, line {number}: got {line[:80]!r}, expected an object with {', '.join(sorted(keys))}; mend the line,"
        " or give another --to to judge all prompts anew"
    )
