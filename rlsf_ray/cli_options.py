"""What the commands of `rlsf` share: their arguments and options, and what these name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlsf_ray.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from rlsf_ray.config import RunConfig
    from rlsf_ray.plan import Plan
    from rlsf_ray.run_store import RunStore

MOST_ALPHA = 100.0

Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE_OR_FILE", help="A recipe's name (see `rlsf recipes`) or a YAML file.")
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's name under --root, or its folder or URL.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="The run's name.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as loss.beta=0.2; repeatable."),
]
Name = Annotated[str | None, typer.Option("--run", metavar="NAME", help="Name of the run.  [default: RECIPE-seedN]")]
Root = Annotated[
    str, typer.Option(help="Folder or URL that holds the runs; shared storage on a cluster of several nodes.")
]
Address = Annotated[
    str | None, typer.Option(help="Ray's address, such as auto; else RAY_ADDRESS; else a Ray of its own.")
]
Seed = Annotated[int | None, typer.Option(help="Short for --set seed=N.")]
Like = Annotated[
    str | None,
    typer.Option(metavar="RUN", help="Say what to expect by the rates of this finished run on machines of the kind."),
]
Version = Annotated[int | None, typer.Option(help="Version of the adapter.  [default: the newest]")]

MaxHours = Annotated[
    float | None,
    typer.Option(
        min=0.01, metavar="HOURS", help="Drain a run that has taken so long, with pauses and over all its lives."
    ),
]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, metavar="TOKENS", help="Drain a run that has written so many to learn from.")
]


def load(recipe: str, overrides: list[str] | None, seed: int | None) -> RunConfig:
    from rlsf_ray.config_loading import load_config

    return load_config(recipe, [*(overrides or []), *([] if seed is None else [f"seed={seed}"])])


def resources_at(address: str | None) -> tuple[dict[str, float], str]:
    """(what a run would find, where): of the cluster there or at RAY_ADDRESS, else of this machine."""
    from rlsf_ray.plan import local_resources

    address = address or os.environ.get("RAY_ADDRESS")  # as `rlsf run` has it
    if not address:
        return local_resources(), "this machine"
    from rlsf_ray.operate import cluster_resources

    return cluster_resources(address), f"the cluster at {address}"


def expected(plan: Plan, like: RunStore, there: dict[str, float]) -> str:
    """What the planned run will take by the rates of another; see `forecast.rates_of`."""
    from rlsf_ray.forecast import describe_forecast, rates_of

    return describe_forecast(plan, rates_of(like, plan.config, there), there)


def make_console() -> Console:
    from rich.console import Console

    return Console()


def absolute(root: str) -> str:
    """A URL as it is; a folder made absolute, since workers have working directories of their own."""
    return root.rstrip("/") if "://" in root else os.path.abspath(os.path.expanduser(root))


def read_alphas(text: str) -> list[float]:
    try:
        found = [float(alpha) for alpha in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(is_alpha(alpha) for alpha in found):
        raise InputError(
            f"--alphas: expected numbers between commas, none beyond {MOST_ALPHA:g}, such as 0,0.5,1, got {text!r}"
        )
    return found


def is_alpha(alpha: float) -> bool:
    """Far beyond, weights overflow."""
    return abs(alpha) <= MOST_ALPHA


def is_run(run: str, root: str) -> bool:
    return "://" in run or any(Path(folder, "config.yaml").is_file() for folder in (run, Path(absolute(root), run)))


def open_run(run: str, root: str) -> RunStore:
    from rlsf_ray.run_store import RunStore

    is_folder = "://" in run or Path(run, "config.yaml").is_file()
    return RunStore.open(absolute(run) if is_folder else f"{absolute(root)}/{run}")
