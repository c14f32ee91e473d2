"""The commands of `rlsf` for what a run has made: measure it, mix it, ask it, show it, take it out."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlsf_ray.cli_options import (
    MOST_ALPHA,
    Root,
    Run,
    Set,
    Version,
    is_alpha,
    is_run,
    load,
    make_console,
    open_run,
    read_alphas,
)
from rlsf_ray.errors import InputError

if TYPE_CHECKING:
    from rlsf_ray.config import RunConfig
    from rlsf_ray.run_store import RunStore

results = typer.Typer()


class What(StrEnum):
    """What `rlsf export` can take out of a run."""

    adapter = "adapter"
    merged = "merged"
    pairs = "pairs"


@results.command("eval")
def evaluate(
    run_or_model: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A run, or a model's name, folder or hub id.")
    ],
    version: Version = None,
    recipe: Annotated[
        str | None, typer.Option(help="Where the probe set and sampling of a MODEL come from.  [default: rlsf]")
    ] = None,
    set_: Set = None,
    root: Root = "runs",
    as_json: Annotated[bool, typer.Option("--json", help="Every metric as JSON instead of a table.")] = False,
) -> None:
    """Measure a run's newest adapter, or any model, on the probe set."""
    store = open_run(run_or_model, root) if is_run(run_or_model, root) else None
    if store is None:
        if version:
            raise InputError(f"--version {version}: {run_or_model} is not a run under {root}; expected a run's name")
        config = load(recipe or "rlsf", [f"model.name={run_or_model}", *(set_ or [])], None)
    elif recipe:
        raise InputError(f"--recipe {recipe}: {run_or_model} is a run, measured as its own recipe says; leave it out")
    else:
        from rlsf_ray.config_loading import override_config

        config = override_config(store.config, set_ or [])
    _evaluate(config, store, version, keep=not set_, as_json=as_json)


@results.command()
def mix(
    run: Run,
    other: Annotated[str | None, typer.Argument(help="A second model or run: mix the two.")] = None,
    alphas: Annotated[
        str | None, typer.Option(help="Between commas.  [default: 0 to 1 by quarters; of one run 1.25 too]")
    ] = None,
    version: Version = None,
    root: Root = "runs",
    recipe: Annotated[str | None, typer.Option(help="Of two: what to measure.  [default: rlif_self_certainty]")] = None,
    set_: Set = None,
    train: Annotated[bool, typer.Option("--train", help="Of two: run the recipe from each, 5 rounds.")] = False,
    to: Annotated[Path | None, typer.Option(help="Of two: folder for mixtures and runs.  [default: mixed]")] = None,
) -> None:
    """Measure base + alpha x adapter on the probe set: does the adapter help all the way?

    With a second model or run, (1 - alpha) A + alpha B: does the first entropy tell what a run gains?
    """
    wanted = read_alphas(alphas or ("0,0.25,0.5,0.75,1" if other else "0,0.25,0.5,0.75,1,1.25"))
    for_two = {"--recipe": recipe, "--set": set_, "--train": train, "--to": to}
    for_one = {"--version": version is not None}
    idle = [name for name, value in (for_two if other is None else for_one).items() if value]
    if idle:
        raise InputError(f"{idle[0]}: is for {'two models' if other is None else 'one run'}; leave it out")
    if other is not None:
        ends = (run, other)
        short = ["rounds=5"] if train else []  # --set says otherwise
        return _mix_two(
            ends, root, wanted, load(recipe or "rlif_self_certainty", short + (set_ or []), None), train, to
        )
    from rlsf_ray.export import latest_version
    from rlsf_ray.mix import mix as measure
    from rlsf_ray.progress import print_mix

    store, console = open_run(run, root), make_console()
    with console.status("measuring") as spinner:
        show = lambda alpha: spinner.update(f"measuring alpha {alpha:g}")  # noqa: E731
        print_mix(console, measure(store, latest_version(store, version), wanted, show))


@results.command()
def answer(
    run: Run,
    questions: Annotated[list[str] | None, typer.Argument(help="Questions; without any, a line of input each.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="A question a line; .jsonl: a JSON text or a list of messages.")
    ] = None,
    sure: Annotated[float, typer.Option(min=0, max=1, help="Confidence that needs no further trace.")] = 0.8,
    least: Annotated[float, typer.Option(min=0, max=1, help="Abstain below this confidence.")] = 0.0,
    most: Annotated[int, typer.Option(min=1, help="Traces a question may take.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a line instead of a table.")] = False,
    version: Version = None,
    root: Root = "runs",
) -> None:
    """Answer questions with a run's model, each with its confidence: calibrated for one trace, rougher for a vote."""
    from rlsf_ray.answer import Answerer, read_questions
    from rlsf_ray.export import latest_version
    from rlsf_ray.progress import print_replies

    store, asked = open_run(run, root), read_questions(questions or [], file)
    number = latest_version(store, version) if version != 0 else 0
    with closing(Answerer(store, number)) as answerer:
        replies = answerer(asked, sure=sure, least=least, most=most)
    if as_json:
        print("\n".join(json.dumps(asdict(reply), ensure_ascii=False) for reply in replies))
    else:
        print_replies(make_console(), replies)


@results.command()
def report(
    run: Run,
    beside: Annotated[
        list[str] | None, typer.Option(metavar="RUN", help="Compare with another run, such as a control; repeatable.")
    ] = None,
    root: Root = "runs",
) -> None:
    """Write a run's report.html."""
    from rlsf_ray.report import write_report

    print(write_report(open_run(run, root), [open_run(other, root) for other in beside or ()]))


@results.command()
def export(
    run: Run,
    what: Annotated[What, typer.Option(help="PEFT folder, whole model folder, or preference data as TRL reads it.")],
    to: Annotated[Path, typer.Option(help="New folder; for pairs a file that ends in .jsonl or .parquet.")],
    version: Version = None,
    alpha: Annotated[float, typer.Option(help="Scale of what the adapter changes: 0 is the base model.")] = 1.0,
    root: Root = "runs",
) -> None:
    """Take an adapter, the merged model or the preference pairs out of a run."""
    from rlsf_ray.export import export_adapter, export_merged, export_pairs, latest_version

    store = open_run(run, root)
    if not is_alpha(alpha) or (what is What.pairs and alpha != 1.0):
        raise InputError(
            f"--alpha: expected a number up to {MOST_ALPHA:g}, and none for pairs; got {alpha} with --what {what}"
        )
    if what is What.pairs:
        print(export_pairs(store, to))
    else:
        write = export_adapter if what is What.adapter else export_merged
        print(write(store, latest_version(store, version), to, alpha))


def _evaluate(config: RunConfig, store: RunStore | None, version: int | None, *, keep: bool, as_json: bool) -> None:
    from rlsf_ray.encoding import to_json
    from rlsf_ray.export import latest_version
    from rlsf_ray.plan import check_input
    from rlsf_ray.progress import print_metrics
    from rlsf_ray.tasks.sources import load_sets

    number = latest_version(store, version) if store is not None and version != 0 else 0
    check_input(config)
    sets = load_sets(config)
    if not sets.probe:
        raise InputError("there is no probe set to measure on: data.probe is empty; give it a source with answers")
    from rlsf_ray.evaluate import measure_version

    console = make_console()
    with console.status("measuring") as spinner:
        result = measure_version(
            store, config, sets, number, lambda done: spinner.update(f"measuring: {done}/{len(sets.probe)} questions")
        )
    if store is not None and keep:
        store.write_evaluation(result)
    what = (config.model.name if store is None else store.root).rstrip("/").rpartition("/")[2]
    if as_json:
        found = {"of": what, "version": number, "questions": len(sets.probe), "metrics": result["metrics"]}
        return print(to_json(found).decode(), end="")
    print_metrics(console, f"{what}, version {number}, {len(sets.probe)} questions", result["metrics"])


def _mix_two(
    ends: tuple[str, str], root: str, alphas: list[float], config: RunConfig, train: bool, to: Path | None
) -> None:
    from rlsf_ray.between import between, draw
    from rlsf_ray.progress import print_between

    console, folder = make_console(), (to or Path("mixed")).absolute()
    a, b = (open_run(end, root) if is_run(end, root) else end for end in ends)
    if train:
        console.print(f"{len(alphas)} mixtures, and a run of {config.rounds} rounds from each, in {folder}")
    with console.status("measuring") as spinner:
        found = between(a, b, alphas, config, folder, train=train, tell=spinner.update)
    print_between(console, found, draw(found, folder))
