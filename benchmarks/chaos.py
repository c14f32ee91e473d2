"""Kill a run's processes at random while it goes on, and count what is lost: the real service, a tiny model.

    python benchmarks/chaos.py actors  [--kills 30] [--seed 0]    SIGKILL of one process after the other, of every role
    python benchmarks/chaos.py cluster [--kills 20] [--seed 0]    SIGKILL of everything at once, again and again

Where a death ends the run, the same command is given again, as a supervisor would. At the end every prompt has one end,
and pairs, adapters and accounting are those of a run in one process that nobody disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench_common import machine_facts, own_ray  # noqa: E402
from private_cluster import Sandbox, unavailable  # noqa: E402
from running import our_processes  # noqa: E402
from tiny import tiny_config, tiny_model  # noqa: E402

from rlsf_ray import loop, service  # noqa: E402
from rlsf_ray.config import RunConfig  # noqa: E402
from rlsf_ray.config_loading import dump_config  # noqa: E402
from rlsf_ray.errors import RlsfError, ServiceError  # noqa: E402
from rlsf_ray.records import Json  # noqa: E402
from rlsf_ray.run_store import RunStore  # noqa: E402

RUN, PROMPTS = "chaos", 16
ROLES = {  # as users know them: the name of the actor's class
    "generator": "Generator",
    "scorer": "ScorerWorker",
    "training worker": "RayTrainWorker",
    "train driver": "TrainDriver",
    "pair buffer": "PairBuffer",
    "weight store": "WeightStore",
    "evaluator": "Evaluator",
    "coordinator": "Coordinator",
}
MOVE_S = 300.0  # a run that does not move for so long has hung
LOOK_S = 0.2


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill: `back_s` until a process of the role stood there again and the run had then moved on.

    `new_life`: that took the same command once more.
    """

    role: str
    back_s: float
    new_life: bool


def config_of(model: Path, rounds: int) -> RunConfig:
    """Strict rounds in float32 with two generators: what is trained does not depend on who is killed when."""
    sums = {"name": "chain_sum", "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}}
    pool = {"cpus": 0.5, "threads": 1}
    return tiny_config(
        model,
        rounds=rounds,
        prompts_per_round=PROMPTS,
        data={"train": [sums | {"count": rounds * PROMPTS}], "probe": [], "calibration": 4},
        cluster={"prompts_per_call": 2, "attempts": 5, "generators": pool | {"count": 2}, "deadline_s": 120},
    )


def progress(root: Path) -> int:
    """Grows with every batch and every optimiser step."""
    log = root / "metrics" / "train.jsonl"
    return len(list(root.glob("traces/*/part-*.parquet"))) + (log.read_bytes().count(b"\n") if log.exists() else 0)


class Killer(threading.Thread):
    """Kills one process after the other, each once the run has moved on since the one before."""

    def __init__(self, root: Path, kills: int, seed: int) -> None:
        super().__init__(daemon=True)
        self._root, self._wanted, self._draw = root, kills, random.Random(seed)
        self.kills: list[Kill] = []
        self.lives, self.over = 0, threading.Event()  # the driver counts its lives here
        self.hung = ""

    def run(self) -> None:
        order: list[str] = []
        self._until(lambda: progress(self._root) > 0, "the start")
        while len(self.kills) < self._wanted and not self.over.wait(self._draw.uniform(0.0, 4.0)):
            order = order or self._draw.sample(sorted(ROLES), len(ROLES))
            role = order.pop()
            found = _processes(ROLES[role])
            if found:
                self._kill(role, found)
            else:
                order.insert(0, role)  # it restarts just now

    def _kill(self, role: str, found: list[psutil.Process]) -> None:
        lives, at, known = self.lives, time.monotonic(), {process.pid for process in found}
        self._draw.choice(found).kill()
        self._until(lambda: {one.pid for one in _processes(ROLES[role])} - known, f"the kill of a {role}")
        before = progress(self._root)
        self._until(lambda: progress(self._root) > before, f"the kill of a {role}")
        self.kills.append(Kill(role, time.monotonic() - at, self.lives > lives))
        print(f"kill {len(self.kills)}: {role}, on again after {self.kills[-1].back_s:.1f} s", flush=True)

    def _until(self, ready: Callable[[], object], what: str) -> None:
        """Return once `ready()`, or when the run is over, which it also is when nothing comes for too long."""
        until = time.monotonic() + MOVE_S
        while not ready() and not self.over.wait(LOOK_S):
            if time.monotonic() > until:
                self.hung = f"the run did not move for {MOVE_S:g} s after {what}"
                self.over.set()
                os.kill(os.getpid(), signal.SIGTERM)  # drains it


def _processes(name: str) -> list[psutil.Process]:
    """Ours with an actor of that class."""
    named = our_processes(lambda one: "".join(one.cmdline()[:1]).partition("::")[2].partition(".")[0].strip() == name)
    return sorted(named, key=lambda process: process.pid)


def kill_actors(folder: Path, config: RunConfig, options: argparse.Namespace) -> tuple[list[Kill], list[str]]:
    """(kills, the errors that lives of the run have ended with)."""
    killer, errors = Killer(folder / RUN, options.kills, options.seed), list[str]()
    with own_ray():
        killer.start()
        while True:
            killer.lives += 1
            try:
                service.run(config, root=str(folder / RUN), run_name=RUN)
                break
            except ServiceError as error:
                errors.append(f"{type(error).__name__}: {error}".splitlines()[0])
                print(f"life {killer.lives} ended: {errors[-1][:160]}", flush=True)
        killer.over.set()
        killer.join()
    if killer.hung or len(killer.kills) < options.kills:
        sys.exit(killer.hung or f"the run was over after {len(killer.kills)} kills; raise --rounds")
    return killer.kills, errors


def kill_clusters(folder: Path, config: RunConfig, options: argparse.Namespace) -> tuple[list[Kill], list[str]]:
    """Everything dies at a random moment of each life."""
    if reason := unavailable():
        sys.exit(reason)
    draw, kills, root = random.Random(options.seed), list[Kill](), folder / RUN
    (folder / "chaos.yaml").write_text(dump_config(config))
    with Sandbox(folder) as sandbox:
        for number in range(options.kills + 1):
            before, at = progress(root), time.monotonic()
            life = sandbox.start("rlsf", "run", "chaos.yaml", "--root", ".", "--run", RUN)
            if number < options.kills:
                life.until(lambda before=before: progress(root) > before, MOVE_S)
                kills.append(Kill("everything", time.monotonic() - at, new_life=True))
                time.sleep(draw.uniform(0.0, 8.0))
                sandbox.restart()
                print(f"kill {number + 1}: everything, on again after {kills[-1].back_s:.1f} s", flush=True)
            elif life.wait(MOVE_S * 4) != 0:
                sys.exit(life.output)
    return kills, []


def check(folder: Path, config: RunConfig) -> Json:
    """What was lost, what was done twice, and whether all is as in an undisturbed run of the loop."""
    store, calm = RunStore.open(str(folder / RUN)), RunStore.open(str(folder / "calm"))
    ended, expected = (one.read_json("summary.json")["accounting"] for one in (store, calm))
    traces = store.read_table("traces").to_pylist()
    prompts = {(row["round"], row["sequence"]) for row in traces}
    groups = [row["id"] for row in store.read_table("groups").to_pylist()]
    last = max(store.versions())
    found, wanted = (one.read_adapter(last)[0] for one in (store, calm))
    return {
        "admitted": ended["admitted"],
        "lost": config.rounds * PROMPTS - len(prompts) - ended["failed"],
        "doubled": len(traces) - len({row["trace_id"] for row in traces}) + len(groups) - len(set(groups)),
        "accounting_equal": ended == expected,
        "pairs_equal": store.read_table("pairs").to_pylist() == calm.read_table("pairs").to_pylist(),
        "largest_difference_of_last_adapter": float(max(np.abs(found[name] - wanted[name]).max() for name in wanted)),
        "versions": last,
    }


def table(result: Json) -> str:
    """The kills by role, and what came of them, as Markdown."""
    lines = [
        "| role | kills | on again in the same life | by a new one | median s | longest s |",
        "|---|---|---|---|---|---|",
    ]
    for role in sorted({kill["role"] for kill in result["kills"]}):
        kills = [kill for kill in result["kills"] if kill["role"] == role]
        new, times = sum(kill["new_life"] for kill in kills), [kill["back_s"] for kill in kills]
        row = (role, len(kills), len(kills) - new, new, f"{statistics.median(times):.1f}", f"{max(times):.1f}")
        lines.append(f"| {' | '.join(map(str, row))} |")
    check = result["check"]
    lines += [
        "",
        f"{len(result['kills'])} kills, {check['admitted']} prompts, {check['versions']} versions:"
        f" lost {check['lost']}, doubled {check['doubled']}. Beside an undisturbed run: accounting"
        f" {'equal' if check['accounting_equal'] else 'DIFFERENT'}, pairs"
        f" {'equal' if check['pairs_equal'] else 'DIFFERENT'}, last adapter within"
        f" {check['largest_difference_of_last_adapter']:.1g}.",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("actors", "cluster"))
    parser.add_argument("--kills", type=int, help="[default: 30 of actors, 20 of clusters]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=60, help="of the run: enough to outlive the kills")
    options = parser.parse_args(arguments)
    options.kills = options.kills or (30 if options.what == "actors" else 20)
    kill = kill_actors if options.what == "actors" else kill_clusters
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        config = config_of(tiny_model(folder / "model"), options.rounds)
        began = time.monotonic()
        try:
            kills, errors = kill(folder, config, options)
        except RlsfError as error:
            sys.exit(f"not a fault of the service: {error}")
        minutes = (time.monotonic() - began) / 60
        loop.run(config, str(folder / "calm"))
        result = {
            "command": f"python benchmarks/chaos.py {options.what} --kills {options.kills} --seed {options.seed}",
            "machine": machine_facts(),
            "minutes": minutes,
            "kills": [asdict(one) for one in kills],
            "errors": errors,
            "check": check(folder, config),
        }
    print(table(result))
    out = ROOT / "benchmarks" / "results" / f"chaos_{options.what}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    good: Any = result["check"]
    sys.exit(bool(good["lost"] or good["doubled"] or not good["pairs_equal"] or not good["accounting_equal"]))


if __name__ == "__main__":
    main()
