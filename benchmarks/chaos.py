"""Kill a run's processes at random while it goes on, and count what is lost: the real service, a tiny model.

    python benchmarks/chaos.py actors  [--kills 30] [--seed 0]    SIGKILL of one process after the other, of every role
    python benchmarks/chaos.py cluster [--kills 20] [--seed 0]    SIGKILL of everything at once, again and again
    python benchmarks/chaos.py page                               results/chaos.md from the committed results

Where a death ends the run, the same command is given again, as a supervisor would. At the end every prompt has one end,
every pair behind the last adapter was trained as often as the recipe says, and all is as in a run in one process that
nobody disturbed (chaos_check.py). The exit code is 0 only then.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench_common import commit, machine_facts  # noqa: E402
from chaos_check import Accounts, check, faults, table  # noqa: E402
from chaos_kills import RUN, Hang, kill_actors, kill_clusters  # noqa: E402
from tiny import tiny_config, tiny_model  # noqa: E402

from rlsf_ray import loop  # noqa: E402
from rlsf_ray.config import RunConfig  # noqa: E402
from rlsf_ray.errors import RlsfError  # noqa: E402
from rlsf_ray.records import Json  # noqa: E402
from rlsf_ray.run_store import RunStore  # noqa: E402

PROMPTS, BATCH = 16, 2
RESULTS = ROOT / "benchmarks" / "results"
HEADS = {"actors": "One process after the other, of every role", "cluster": "Everything at once"}


def config_of(model: Path, rounds: int) -> RunConfig:
    """Strict rounds in float32 with two generators: what is trained does not depend on who is killed when."""
    sums = {"name": "chain_sum", "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}}
    pool = {"cpus": 0.5, "threads": 1}
    return tiny_config(
        model,
        rounds=rounds,
        prompts_per_round=PROMPTS,
        data={"train": [sums | {"count": rounds * PROMPTS}], "probe": [], "calibration": 4},
        cluster={"prompts_per_call": BATCH, "attempts": 5, "generators": pool | {"count": 2}, "deadline_s": 120},
    )


def measure(folder: Path, options: argparse.Namespace) -> tuple[Json, list[str]]:
    """(result, what of it must not be). Raises Hang, RlsfError."""
    config = config_of(tiny_model(folder / "model"), options.rounds)
    accounts, began = Accounts(folder / RUN, config), time.monotonic()
    kill = kill_actors if options.what == "actors" else kill_clusters
    kills, errors = kill(folder, config, accounts, options.kills, options.seed)
    minutes = (time.monotonic() - began) / 60
    loop.run(config, str(folder / "calm"))
    store, calm = (RunStore.open(str(folder / name)) for name in (RUN, "calm"))
    arguments = f"--kills {options.kills} --seed {options.seed} --rounds {options.rounds}"
    result = {
        "what": options.what,
        "command": f"python benchmarks/chaos.py {options.what} {arguments}",
        "machine": machine_facts(),
        "commit": commit(),
        "minutes": minutes,
        "wanted": options.kills,
        "kills": [{name: value for name, value in asdict(kill).items() if name != "at"} for kill in kills],
        "errors": errors,
        "accounts": {"samples": accounts.samples, "violations": accounts.violations},
        "check": check(store, calm),
    }
    return result, faults(result, config)


def page(results: Sequence[Json]) -> str:
    """chaos.md, from the committed results."""
    lines = [
        "# Kills while a run goes on",
        "",
        "Written by `python benchmarks/chaos.py page`. The real service trains a tiny model in float32, in strict"
        " rounds, while its processes are killed (SIGKILL); where a death ends the run, the same command is given"
        " again. Recovered: a process of the role stands there again and the run has then moved on. Compared with a run"
        " that nobody disturbed. Two generators, one scorer, five attempts a batch. A sample of the status is right"
        " if whole rounds are admitted and its sums close, one of the disk if what has ended stays so and each version"
        " was trained on as many prompts as are booked.",
    ]
    for result in results:
        machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
        code = f", commit {result['commit']}" if result.get("commit") else ""
        told = f"`{result['command']}`: {result['minutes']:.0f} min on {machine}{code}."
        lines += ["", f"## {HEADS[result['what']]}", "", told, "", table(result), "", *result["faults"]]
    return "\n".join(lines).rstrip() + "\n"


def write_page() -> None:
    found = [RESULTS / f"chaos_{what}.json" for what in HEADS]
    kept = [json.loads(file.read_text()) for file in found if file.exists()]
    (RESULTS / "chaos.md").write_text(page(kept))


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=(*HEADS, "page"), help="page: only write chaos.md anew")
    parser.add_argument("--kills", type=int, help="[default: 30 of actors, 20 of clusters]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=60, help="of the run: enough to outlive the kills")
    parser.add_argument("--out", type=Path, help="JSON file [default: in benchmarks/results]")
    options = parser.parse_args(arguments)
    if options.what == "page":
        return write_page()
    options.kills = options.kills or (30 if options.what == "actors" else 20)
    out: Any = options.out or RESULTS / f"chaos_{options.what}.json"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        try:
            result, wrong = measure(Path(name), options)
        except Hang as hang:
            sys.exit(str(hang))
        except RlsfError as error:
            sys.exit(f"the run has not come to its end: {type(error).__name__}: {error}")
    print(table(result))
    out.write_text(json.dumps(result | {"faults": wrong}, indent=2) + "\n")
    write_page()
    sys.exit("\n".join(["FAULTS:", *wrong]) if wrong else 0)


if __name__ == "__main__":
    main()
