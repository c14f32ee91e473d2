"""The command `rlsf`. Whatever is heavy is imported inside the command that needs it.

Exit codes: 0 done, 2 input, 3 guard or no pairs, 4 service, 5 drained; 143 after SIGTERM where nothing drains.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlsf_ray.cli_operations import operations
from rlsf_ray.cli_options import (
    Address,
    Like,
    MaxHours,
    MaxTokens,
    Name,
    Recipe,
    Root,
    Seed,
    Set,
    absolute,
    expected,
    load,
    make_console,
    open_run,
    resources_at,
)
from rlsf_ray.cli_results import results
from rlsf_ray.errors import RlsfError
from rlsf_ray.stream.limits import NO_LIMITS, Limits

if TYPE_CHECKING:
    from rlsf_ray.config import RunConfig
    from rlsf_ray.records import Json

app = typer.Typer(
    help="A language model improves itself from its own feedback, spread over a Ray cluster.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(operations)
app.add_typer(results)


class Track(StrEnum):
    """Where a run's curves can go besides TensorBoard's files."""

    mlflow = "mlflow"
    wandb = "wandb"


@app.command()
def run(
    recipe: Recipe,
    set_: Set = None,
    name: Name = None,
    root: Root = "runs",
    address: Address = None,
    seed: Seed = None,
    max_hours: MaxHours = None,
    max_tokens: MaxTokens = None,
    track: Annotated[Track | None, typer.Option(help="Send the curves there too.")] = None,
) -> None:
    """Run a recipe; the same command again resumes it."""
    _run(load(recipe, set_, seed), name, root, address, Limits(hours=max_hours, tokens=max_tokens), track)


@app.command()
def demo(
    set_: Set = None,
    name: Name = None,
    root: Root = "runs",
    address: Address = None,
    seed: Seed = None,
) -> None:
    """Let SmolLM2-135M teach itself arithmetic, and measure it before and after."""
    console = make_console()
    console.print("SmolLM2-135M-Instruct improves its own arithmetic: no labels, no reward model.", highlight=False)
    _run(load("rlsf", set_, seed), name, root, address)


@app.command()
def plan(
    recipe: Recipe, set_: Set = None, address: Address = None, seed: Seed = None, like: Like = None, root: Root = "runs"
) -> None:
    """Print the resolved config, what the run needs and what is missing; start nothing."""
    from rlsf_ray.plan import check_input, describe

    checked, (there, where) = check_input(load(recipe, set_, seed)), resources_at(address)
    print(describe(checked, there, where))
    if like:
        print(expected(checked, open_run(like, root), there))


@app.command()
def failures(
    recipe: Recipe,
    to: Annotated[Path, typer.Option(help="New .jsonl file of prompts; the same call again goes on.")],
    most: Annotated[float, typer.Option(help="Largest share of passing samples that is kept, below 1.")] = 0.5,
    set_: Set = None,
    seed: Seed = None,
) -> None:
    """Find the training prompts that the model fails, as data for recipes that learn from failures."""
    from rlsf_ray.failures import find_failures
    from rlsf_ray.plan import check_input

    config = load(recipe, set_, seed)
    check_input(config)
    console = make_console()
    with console.status("sampling") as spinner:
        told = lambda done, of, kept: spinner.update(f"sampling: {done}/{of} prompts, {kept} kept")  # noqa: E731
        kept, judged = find_failures(config, to, most=most, on_batch=told)
    print(f"{kept} of {judged} prompts kept in {to}")


@app.command()
def recipes() -> None:
    """List the recipes."""
    from rlsf_ray.config_loading import recipe_names, recipe_text

    width = max(map(len, recipe_names()))
    for name in recipe_names():
        print(f"{name:{width}}  {recipe_text(name).splitlines()[0].lstrip('# ')}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command: every error ends with its exit code."""
    sys.path.append(os.getcwd())  # a user's own functions lie there; `python -m` does the same
    exit_on_sigterm()
    try:
        app(args=arguments, prog_name="rlsf")
    except RlsfError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception:  # the one broad except: whatever was not foreseen is a fault of the service
        traceback.print_exc()
        sys.exit(RlsfError.exit_code)


def exit_on_sigterm() -> None:
    """SIGTERM ends this process as an error would, so that an engine's processes end with it. A run drains instead."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def _run(
    config: RunConfig,
    name: str | None,
    root: str,
    address: str | None,
    limits: Limits = NO_LIMITS,
    track: str | None = None,
) -> None:
    from rlsf_ray.logs import setup_logging
    from rlsf_ray.plan import check_input
    from rlsf_ray.progress import Progress, print_before_after
    from rlsf_ray.tracking import Tracking

    check_input(config)
    from rlsf_ray import service  # heavy, and not needed to refuse bad input

    run_name = config.default_name if name is None else name
    setup_logging("driver", run_name)
    console = make_console()
    folder = f"{absolute(root)}/{run_name}"
    with ExitStack() as stack:
        tracking = stack.enter_context(Tracking(track, folder, run_name)) if track else None
        progress = stack.enter_context(Progress(console))

        def tell(status: Json) -> None:
            progress(status)
            if tracking:
                tracking(status)

        summary = service.run(
            config,
            root=folder,
            run_name=run_name,
            address=address,
            on_status=tell,
            limits=limits,
            webhook=os.environ.pop("RLSF_WEBHOOK", None),  # no process of a Ray of ours needs it
        )
    print_before_after(console, summary)
    _print_costs(summary)
    print(f"run directory: {folder}\n  summary: {folder}/summary.json\n  report:  {folder}/report.html")


def _print_costs(summary: Json) -> None:
    from rlsf_ray.wording import duration

    costs = []
    if (seconds := (summary.get("seconds") or {}).get("total")) is not None:
        costs.append(f"time {duration(seconds)}")
    if (memory := summary.get("peak_memory_gb")) is not None:
        costs.append(f"peak memory of all processes {memory:.1f} GB")
    if costs:
        print(", ".join(costs))
