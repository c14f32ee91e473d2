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
from rlsf_ray.base_cache import cached_base, store_base
from rlsf_ray.config import RunConfig
from rlsf_ray.config_loading import override_config
from rlsf_ray.errors import InputError
from rlsf_ray.evaluate import measure_version
from rlsf_ray.export import export_merged, latest_version
from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore
from rlsf_ray.tasks.sources import load_sets

Tell = Callable[[str], None]


def between(
    a: str, b: str, alphas: Sequence[float], config: RunConfig, to: Path, *, train: bool, tell: Tell = lambda text: None
) -> Json:
    """Measure each mixture of `a` and `b` (a model's name or folder, or a run) on `config`'s probe set.

    `train`: and run `config` on it, in the folder `to`, where a call that was cut off goes on. Returns {"a", "b",
    "num_questions", "points": [{"alpha", "metrics", "vitals", "after"}]}; "after" is None without training.
    Raises InputError where the two do not have the same shapes, or there is no probe set.
    """
    if not load_sets(config).probe:
        raise InputError("there is no probe set to measure on: data.probe is empty; give it a source with answers")
    points = []
    with tempfile.TemporaryDirectory() as scratch:
        ends = [_folder_of(name, config, Path(scratch) / which) for name, which in ((a, "a"), (b, "b"))]
        for alpha in sorted(set(alphas)):
            tell(f"mixing at alpha {alpha:g}")
            model = write_mixture(ends[0], ends[1], alpha, to / "models" / f"{alpha:g}")
            tell(f"measuring alpha {alpha:g}")
            points.append(_point(alpha, override_config(config, [f"model.name={model}"]), to, tell if train else None))
    return {"a": a, "b": b, "num_questions": len(load_sets(config).probe), "points": points}


def write_between(found: Json, to: Path) -> Path:
    """Keep what `between` found: between.json, and between.svg with the gain over the entropy. Returns the picture."""
    to.mkdir(parents=True, exist_ok=True)
    (to / "between.json").write_text(json.dumps(found, indent=1) + "\n")
    points = [{"alpha": p["alpha"], "entropy": p["metrics"]["surprisal"], "gain": gain(p)} for p in found["points"]]
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
    after = None
    if tell is not None:
        show = lambda status: tell(f"alpha {alpha:g}: round {status['round'] + 1}, {status['message']}")  # noqa: E731
        after = loop.run(config, str(to / "runs" / f"{alpha:g}"), show)["after"]
    return {"alpha": alpha, "metrics": before["metrics"], "vitals": before["vitals"], "after": after}


def write_mixture(a: Path, b: Path, alpha: float, to: Path) -> Path:
    """Save (1 - alpha) A + alpha B, summed in float32 and rounded once, with A's tokenizer, as a model folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from rlsf_ray.engines.lora import rounded

    disable_progress_bar()
    mixed, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (a, b))
    theirs = dict(other.named_parameters())
    with torch.no_grad():
        for name, parameter in mixed.named_parameters():
            if name not in theirs or theirs[name].shape != parameter.shape:
                got: Any = tuple(theirs[name].shape) if name in theirs else "nothing"
                raise InputError(
                    f"{a} and {b} cannot be mixed: {name} has shape {tuple(parameter.shape)} in one and {got} in the"
                    " other; give two models of one architecture"
                )
            total = (1.0 - alpha) * parameter.float() + alpha * theirs[name].float()
            parameter.data = rounded(total, parameter.dtype, name)
    shutil.rmtree(to, ignore_errors=True)
    mixed.save_pretrained(to)
    AutoTokenizer.from_pretrained(a).save_pretrained(to)
    return to


def _folder_of(name: str, config: RunConfig, scratch: Path) -> Path:
    """The model folder of a model's name, or the merged model of a run's last version."""
    if (Path(name) / "config.yaml").exists():
        store = RunStore.open(name)
        return export_merged(store, latest_version(store, None), scratch)
    from rlsf_ray.engines.models import find_model

    return find_model(override_config(config, [f"model.name={name}"]).model.name)
