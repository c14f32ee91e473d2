"""Models along base + alpha x adapter: does the adapter help all the way, or only part of it?

After RLIF's diagnosis of why internal feedback degrades (2506.17219, section 5): what changes on the way from the base
model to the trained one, and beyond it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

from rlsf_ray.adapters import scaled
from rlsf_ray.engines.build import build_engine
from rlsf_ray.errors import InputError
from rlsf_ray.evaluate import answers_before, evaluate_version
from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore
from rlsf_ray.tasks.sources import load_sets

MIX_FILE = "mix.json"


def mix(store: RunStore, version: int, alphas: Sequence[float], on_alpha: Callable[[float], None]) -> Json:
    """Measure `version` at each alpha on the run's probe set; writes mix.json after each, and returns it.

    {"version", "num_questions", "points": [{"alpha", "metrics", "vitals"}]}. What an interrupted call has measured is
    kept. Raises InputError without a probe set.
    """
    config, sets = store.config, load_sets(store.config)
    if not sets.probe:
        raise InputError("there is no probe set to measure on: data.probe is empty; give it a source with answers")
    wanted = sorted(set(alphas))
    result: Json = {"version": version, "num_questions": len(sets.probe), "points": []}
    before = store.read_json(MIX_FILE)
    known = {point["alpha"]: point for point in before["points"]} if before and _alike(before, result) else {}
    adapter, missing = store.read_adapter(version)[0], [alpha for alpha in wanted if alpha not in known]
    if not missing:
        return result | {"points": [known[alpha] for alpha in wanted]}
    with closing(build_engine(config)) as engine:
        earlier = answers_before(engine, store, config, sets, version)
        for number, alpha in enumerate(missing, start=1):
            on_alpha(alpha)
            engine.load_version(number, scaled(adapter, alpha))
            found = evaluate_version(engine, sets, config, number, earlier if alpha else None)
            engine.forget_version(number)
            known[alpha] = {"alpha": alpha, "metrics": found["metrics"], "vitals": found["vitals"]}
            store.write_json(MIX_FILE, result | {"points": [known[alpha] for alpha in sorted(known)]})
    return result | {"points": [known[alpha] for alpha in wanted]}


def _alike(one: Json, other: Json) -> bool:
    return all(one[key] == other[key] for key in ("version", "num_questions"))
