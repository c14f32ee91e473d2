"""The commands of `rlsf` for a run that goes on: look at it, hold it, let it go on, end it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from rlsf_ray.cli_options import Address, Root, Run, RunName, make_console, open_run
from rlsf_ray.errors import InputError

FOLLOW_S = 1.0

operations = typer.Typer()


@operations.command()
def status(run: RunName, address: Address = None) -> None:
    """Show how far a running run is."""
    from rlsf_ray import operate
    from rlsf_ray.progress import line, panel

    console, found = make_console(), operate.status(run, address)
    console.print(
        panel(found) if console.is_terminal else line(found), highlight=False, soft_wrap=not console.is_terminal
    )
    if not console.is_terminal:
        counts = found.get("accounting") or {}
        print("accounting: " + ", ".join(f"{name} {count}" for name, count in counts.items()))


@operations.command()
def watch(run: RunName, address: Address = None) -> None:
    """Show a running run until it ends; Ctrl-C leaves it alone."""
    from rlsf_ray import operate
    from rlsf_ray.progress import Progress

    with Progress(make_console()) as progress:
        try:
            operate.watch(run, address, on_status=progress)
        except KeyboardInterrupt:
            return


@operations.command()
def pause(run: RunName, address: Address = None) -> None:
    """Let a running run begin nothing new: what is being written or trained is ended. It keeps its CPUs and GPUs."""
    from rlsf_ray import operate

    operate.pause(run, address)
    print(f"{run} pauses; `rlsf resume {run}` lets it go on")


@operations.command()
def resume(run: RunName, address: Address = None) -> None:
    """Let a paused run go on. A run that was stopped is resumed by its `rlsf run`."""
    from rlsf_ray import operate

    operate.resume(run, address)
    print(f"{run} goes on")


@operations.command()
def rollback(
    run: RunName,
    version: Annotated[int, typer.Argument(min=0, help="An older version; 0 is the base model.")],
    address: Address = None,
) -> None:
    """End a running run on the content of an older version, published as its newest."""
    from rlsf_ray import operate

    operate.roll_back(run, version, address)
    print(f"{run} goes back to version {version} and ends")


@operations.command()
def feed(
    run: RunName,
    file: Annotated[Path, typer.Argument(help="New prompts: .jsonl or .parquet, as data files of the run.")],
    address: Address = None,
) -> None:
    """Give a running run more prompts; the next round that has none yet begins with them."""
    from rlsf_ray import operate

    found = operate.feed(run, file, address)
    known = f", {found['known']} it knew" if found["known"] else ""
    print(f"{run} takes {found['prompts']} prompts from round {found['first_round'] + 1} on{known}")
    if found["prompts"] > found["room"]:
        print(f"the rounds that are left take {found['room']} of them; feed the next run with the others")


@operations.command()
def stop(
    run: RunName,
    address: Address = None,
    now: Annotated[bool, typer.Option("--now", help="Without waiting for the optimiser step.")] = False,
) -> None:
    """Ask a running run to drain: it ends its optimiser step, drops the batches in flight, and can be resumed."""
    from rlsf_ray import operate

    if operate.stop(run, address, now=now):
        print(f"{run} {'stops' if now else 'drains'}; the same `rlsf run` resumes it")
    else:
        print(f"{run} ends by itself just now")


@operations.command()
def logs(
    run: Run,
    role: Annotated[
        str | None, typer.Option(help="Such as coordinator, generator-0 or trainer-0.  [default: all]")
    ] = None,
    last: Annotated[int, typer.Option(min=0, help="Lines from the end.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", help="Go on printing what comes; Ctrl-C ends it.")] = False,
    root: Root = "runs",
) -> None:
    """Print what the actors of a run have logged, running or not; needs a run directory that this machine sees."""
    from rlsf_ray.logs import Tail, log_line, roles

    store = open_run(run, root)
    if not store.storage.local:
        raise InputError(f"{store.root}: at a URL no logs are kept; look at Ray's own (`ray logs`, or its dashboard)")
    known = roles(store.root)
    if role is not None and role not in known:
        raise InputError(
            f"--role {role}: {store.root} has no log of that; expected one of {', '.join(known) or 'none'}"
        )
    new_rows = Tail(store.root, role)
    rows = new_rows()
    rows = rows[len(rows) - min(last, len(rows)) :]
    while True:
        for row in rows:
            print(log_line(row), flush=True)
        if not follow:
            return
        try:
            time.sleep(FOLLOW_S)
        except KeyboardInterrupt:
            return
        rows = new_rows()


@operations.command()
def doctor(
    run: Run,
    to: Annotated[Path, typer.Option(help="New .zip file.")],
    root: Root = "runs",
) -> None:
    """Make one archive for a bug report: config, state, metrics, logs, machine; no questions, answers or secrets."""
    from rlsf_ray.doctor import write_archive

    names = write_archive(open_run(run, root), to)
    print(f"{to}: {', '.join(names)}; look through it before you send it")
