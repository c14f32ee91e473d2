"""Models between two models: does the entropy one begins with tell what internal feedback will gain?

RLIF 2506.17219, section 5: base and instruct weights are mixed, (1 - alpha) A + alpha B, and each mixture is trained.
There the first entropy predicts the gain, and not how much of an instruct model it is.
"""

from __future__ import annotations

import base64
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlsf_ray import loop, plots
from rlsf_ray.base_cache import cached_base, fingerprint, store_base
from rlsf_ray.config import RunConfig
from rlsf_ray.config_loading import override_config
from rlsf_ray.config_sections import ModelConfig
from rlsf_ray.engines.models import generation_config, load_tokenizer
from rlsf_ray.engines.tokens import eos_ids
from rlsf_ray.errors import GuardError, InputError, NoPairsError
from rlsf_ray.evaluate import measure_version
from rlsf_ray.export import export_merged, latest_version
from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore
from rlsf_ray.tasks.sources import load_sets

Tell = Callable[[str], None]


def between(
    a: str | RunStore,
    b: str | RunStore,
    alphas: Sequence[float],
    config: RunConfig,
    to: Path,
    *,
    train: bool,
    tell: Tell = lambda text: None,
) -> Json:
    """Measure each mixture of `a` and `b` (a model's name or folder, or a run) on `config`'s probe set.

    `train`: and run `config` on it. All of it is kept in the folder `to`: a call that was cut off goes on there. Writes
    and returns between.json: {"a", "b", "num_questions", "points": [{"alpha", "metrics", "vitals", "after", "error"}]};
    "after" is None without training, and where that failed for the reason "error". Raises InputError where the two
    models do not have the same shapes, `to` belongs to others, or there is no probe set.
    """
    questions = len(load_sets(config).probe)
    if not questions:
        raise InputError("there is no probe set to measure on: data.probe is empty; give it a source with answers")
    names = [one if isinstance(one, str) else one.root for one in (a, b)]
    found: Json = {"a": names[0], "b": names[1], "num_questions": questions, "points": []}
    with tempfile.TemporaryDirectory() as scratch:
        ends = [_folder_of(one, config, Path(scratch) / which) for one, which in ((a, "a"), (b, "b"))]
        _claim(to, [fingerprint(folder) for folder in ends])
        for alpha in sorted(set(alphas)):
            tell(f"mixing at alpha {alpha:g}")
            model = write_mixture(ends[0], ends[1], alpha, to / "models" / repr(alpha))
            tell(f"measuring alpha {alpha:g}")
            mixed = _with_model(config, str(model))
            found["points"].append(_point(alpha, mixed, to, tell if train else None))
            (to / "between.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def _claim(to: Path, ends: Any) -> None:
    """Raises InputError if `to` holds mixtures of other models: their runs would be taken for ours."""
    to.mkdir(parents=True, exist_ok=True)
    mark, ours = to / "mixed.json", json.loads(json.dumps(ends))
    if mark.exists() and json.loads(mark.read_text()) != ours:
        raise InputError(
            f"--to: {to} holds mixtures of other models, or of other versions of a run; give another folder"
        )
    mark.write_text(json.dumps(ours) + "\n")


def draw(found: Json, to: Path) -> Path | None:
    """between.svg: the gain over the entropy; None where nothing was trained."""
    points = [{"alpha": p["alpha"], "entropy": p["metrics"]["surprisal"], "gain": gain(p)} for p in found["points"]]
    points = [point for point in points if point["gain"] is not None]
    if not points:
        return None
    (to / "between.svg").write_bytes(base64.b64decode(plots.by_entropy(points).partition(",")[2]))
    return to / "between.svg"


def gain(point: Json) -> float | None:
    """Rise of sampled accuracy by training; None without."""
    name = "sampled_accuracy"
    return point["after"][name] - point["metrics"][name] if point["after"] else None


def _point(alpha: float, config: RunConfig, to: Path, tell: Tell | None) -> Json:
    sets = load_sets(config)
    before = cached_base(config, sets) or measure_version(None, config, sets, 0)
    store_base(config, sets, before)
    after, failed = None, None
    if tell is not None:
        show = lambda status: tell(f"alpha {alpha:g}: round {status['round'] + 1}, {status['message']}")  # noqa: E731
        try:
            after = loop.run(config, str(to / "runs" / repr(alpha)), show)["after"]
        except (NoPairsError, GuardError) as error:  # likely where a model is too sure: the other points still count
            failed = str(error)
    return {"alpha": alpha, "metrics": before["metrics"], "vitals": before["vitals"], "after": after, "error": failed}


def write_mixture(a: Path, b: Path, alpha: float, to: Path) -> Path:
    """Save (1 - alpha) A + alpha B, summed in float32 and rounded once, as a model folder.

    Its texts end where those of A or of B do: a base model and one that was taught to talk may end theirs differently.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from rlsf_ray.engines.lora import rounded

    disable_progress_bar()
    mixed, other = (AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False) for folder in (a, b))
    ours, theirs = dict(mixed.named_parameters()), dict(other.named_parameters())
    for name in sorted(ours.keys() | theirs.keys()):
        shapes = [tuple(side[name].shape) if name in side else "nothing" for side in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"{a} and {b} cannot be mixed: {name} has shape {shapes[0]} in one and {shapes[1]} in the other; give"
                " two models of one architecture"
            )
    (tokenizer, ends), (other_tokenizer, other_ends) = (_tokenizer_and_ends(folder) for folder in (a, b))
    known = other_tokenizer.get_vocab()
    if odd := sorted(token for token, number in tokenizer.get_vocab().items() if known.get(token, number) != number):
        raise InputError(
            f"{a} and {b} cannot be mixed: they number {len(odd)} tokens differently, such as {odd[0]!r}; give two"
            " models of one vocabulary"
        )
    tokenizer.chat_template = tokenizer.chat_template or other_tokenizer.chat_template
    mixed.generation_config.eos_token_id = sorted(ends | other_ends)
    with torch.no_grad():
        for name, parameter in ours.items():
            total = (1.0 - alpha) * parameter.float() + alpha * theirs[name].float()
            parameter.data = rounded(total, parameter.dtype, name)
    shutil.rmtree(to, ignore_errors=True)
    mixed.save_pretrained(to)
    tokenizer.save_pretrained(to)
    return to


def _tokenizer_and_ends(folder: Path) -> tuple[Any, set[int]]:
    """A model's tokenizer, with a chat template or without, and the tokens that end its texts."""
    tokenizer = load_tokenizer(ModelConfig(name=str(folder), chat="plain"))
    return tokenizer, eos_ids(generation_config(folder), tokenizer)


def _with_model(config: RunConfig, name: str) -> RunConfig:
    return override_config(config, [f"model.name={json.dumps(name)}"])


def _folder_of(one: str | RunStore, config: RunConfig, scratch: Path) -> Path:
    """The model folder of a model's name, or the merged model of a run's last version."""
    if isinstance(one, RunStore):
        return export_merged(one, latest_version(one, None), scratch)
    from rlsf_ray.engines.models import find_model

    return find_model(_with_model(config, one).model.name)
