"""The kills of chaos.py: one process after the other, or everything at once, and when the run has moved on again."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from bench_common import ROOT, own_ray
from chaos_check import Accounts
from private_cluster import Sandbox, Shell, unavailable
from running import our_processes

from rlsf_ray import service
from rlsf_ray.config import RunConfig
from rlsf_ray.config_loading import dump_config
from rlsf_ray.errors import DrainedError, ServiceError
from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore

RUN = "chaos"
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
LEAVE_S = 90.0  # a hung run that was told to end may take so long
LOOK_S = 0.2
FAILURES = 3
STARTING = 0.25  # share of the lives that are killed while they start
PAUSE_S = 2.0  # between two signs of progress there are moments as well
STEPS = 16  # a round, at most: two pairs a prompt, two epochs, four pairs a step
# One life of the run on a Ray of its own; what it prints is what `rlsf status` would say
LIFE = f"""
import json
from rlsf_ray import service
from rlsf_ray.config_loading import load_config
tell = lambda status: print(json.dumps(status), flush=True)
service.run(load_config("chaos.yaml"), root="{RUN}", run_name="{RUN}", on_status=tell)
"""


class Hang(Exception):
    """The run has stood still for too long. Says what it, and what we, waited for."""


@dataclass
class Kill:
    """One kill, and where in the run it fell.

    `back_s`: until a process of the role stood there again and the run had then moved on; None if the run was over
    before, so that the kill does not count. `new_life`: it took the same command once more.
    """

    role: str
    round: int
    step: int
    stage: str  # starting | generating | training
    at: float = field(default_factory=time.monotonic)
    back_s: float | None = None
    new_life: bool = True

    def recovered(self) -> None:
        """The run has moved on."""
        self.back_s = time.monotonic() - self.at
        where = f"{self.stage} round {self.round + 1} after step {self.step}"
        print(f"kill of {self.role} while {where}: moved on after {self.back_s:.1f} s", flush=True)


Killed = tuple[list[Kill], list[str]]  # and the errors that lives of the run have ended with


def progress(root: Path) -> int:
    """Grows with every batch and every optimiser step."""
    log = root / "metrics" / "train.jsonl"
    return len(list(root.glob("traces/*/part-*.parquet"))) + (log.read_bytes().count(b"\n") if log.exists() else 0)


def place(root: Path, *, starting: bool = False) -> Json:
    """Where the run stands: `round`, counted from 0, `step`, the last that was made, and `stage`."""
    saved = root / "state.json"
    round = len(json.loads(saved.read_text())["ended"]) if saved.exists() else 0
    steps = RunStore.open(str(root)).read_metrics("train") if saved.exists() else []
    last = steps[-1] if steps else {"round": -1, "step": 0}
    stage = "training" if last["round"] == round else "generating"
    return {"round": round, "step": last["step"], "stage": "starting" if starting else stage}


def watch(root: Path, ready: Callable[[], object], over: Callable[[], object], what: str) -> bool:
    """True once `ready()`, False once `over()`. Raises Hang where the run does not move for too long."""
    last, since = progress(root), time.monotonic()
    while not ready():
        if over():
            return False
        if (now := progress(root)) != last:
            last, since = now, time.monotonic()
        elif time.monotonic() - since > MOVE_S:
            raise Hang(f"the run has not moved for {MOVE_S:g} s; waited for {what}")
        time.sleep(LOOK_S)
    return True


class Killer(threading.Thread):
    """Kills one process after the other, each once the run has moved on since the one before."""

    def __init__(self, root: Path, accounts: Accounts, kills: int, seed: int) -> None:
        super().__init__(daemon=True)
        self._root, self._accounts, self._wanted, self._draw = root, accounts, kills, random.Random(seed)
        self.kills: list[Kill] = []
        self.lives, self.over = 0, threading.Event()  # the driver counts its lives here
        self.hung, self._status = "", Json()

    def look(self, status: Json) -> None:
        """Called with each status of the run, every second."""
        self._status = status
        self._accounts.status(status)
        self._accounts.disk()

    def run(self) -> None:
        try:
            self._kill_all()
            while self._moves("the end of the run"):
                pass
        except Hang as hang:
            at = {name: self._status.get(name) for name in ("state", "round", "version", "steps", "fleet", "message")}
            self.hung = f"HANG in life {self.lives}: {hang}; its last status: {at}"
            print(self.hung, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)  # drains the run, if it still hears
            if not self.over.wait(LEAVE_S):
                os._exit(1)

    def _kill_all(self) -> None:
        order: list[str] = []
        if not self._moves("the start"):
            return
        while len(self.kills) < self._wanted and not self.over.wait(self._draw.uniform(0.0, 4.0)):
            order = order or self._draw.sample(sorted(ROLES), len(ROLES))
            role = order.pop()
            if watch(self._root, lambda role=role: _processes(role), self.over.is_set, f"a {role}"):
                self._kill(role)

    def _kill(self, role: str) -> None:
        lives, found = self.lives, _processes(role)
        known = {process.pid for process in found}
        try:
            self._draw.choice(found).kill()
        except (IndexError, psutil.NoSuchProcess):  # it has ended by itself meanwhile
            return
        kill = Kill(role, **place(self._root))
        self.kills.append(kill)
        back = lambda: {process.pid for process in _processes(role)} - known  # noqa: E731
        if watch(self._root, back, self.over.is_set, f"a new process of the {role}") and self._moves(f"the {role}"):
            kill.new_life = self.lives > lives
            kill.recovered()

    def _moves(self, what: str) -> bool:
        """Wait until the run moves; False if it is over."""
        before = progress(self._root)
        return watch(self._root, lambda: progress(self._root) > before, self.over.is_set, f"work after {what}")


def _processes(role: str) -> list[psutil.Process]:
    """Ours of that role; Ray gives a process the title `ray::Class.method`."""
    title = f"ray::{ROLES[role]}"
    named = our_processes(lambda one: "".join(one.cmdline()[:1]).partition(".")[0].strip() == title)
    return sorted(named, key=lambda process: process.pid)


def kill_actors(folder: Path, config: RunConfig, accounts: Accounts, kills: int, seed: int) -> Killed:
    """One process after the other dies. Raises Hang."""
    killer, errors = Killer(folder / RUN, accounts, kills, seed), list[str]()
    with own_ray():
        killer.start()
        try:
            while not killer.hung:
                killer.lives += 1
                try:
                    service.run(config, root=str(folder / RUN), run_name=RUN, on_status=killer.look)
                    break
                except (ServiceError, DrainedError) as error:
                    if isinstance(error, DrainedError) and not killer.hung:
                        raise  # somebody wants to end this program
                    errors.append(f"{type(error).__name__}: {error}".splitlines()[0])
                    print(f"life {killer.lives} ended: {errors[-1][:160]}", flush=True)
        finally:
            killer.over.set()
            killer.join(LEAVE_S)
    if killer.hung:
        raise Hang(killer.hung)
    return killer.kills, errors


class Clusters:
    """Everything dies at a random moment of each life: some while they start, the others after they have moved on."""

    def __init__(self, root: Path, config: RunConfig, accounts: Accounts, kills: int, seed: int) -> None:
        self._root, self._accounts, self._wanted, self._draw = root, accounts, kills, random.Random(seed)
        self._total = config.rounds * (config.prompts_per_round // config.cluster.prompts_per_call + STEPS)
        self._start_s = 0.0  # that a life has needed last
        self._began, self._before, self._moved = 0.0, 0, False  # of this life
        self._failures = 0  # lives in a row that have ended by themselves and done nothing
        self.kills, self.errors = list[Kill](), list[str]()

    def run(self, sandbox: Sandbox) -> None:
        """Lives one after the other until the run is over. Raises Hang, ServiceError where they fail on and on."""
        # Settings of Ray itself, as RAY_worker_niceness, hold inside as well
        environment = {name: value for name, value in os.environ.items() if re.match("RAY_[a-z]", name)}
        over = False
        while not over:
            self._began, self._before, self._moved = time.monotonic(), progress(self._root), False
            life = sandbox.start(sys.executable, "-c", LIFE, env=environment | {"PYTHONPATH": str(ROOT)})
            try:
                self._live(life)
            except Hang as hang:
                said = life.output[-800:]
                raise Hang(f"HANG after {len(self.kills)} kills: {hang}; its last words: {said}") from hang
            code = life.code
            sandbox.restart()
            self._look()
            self._count(life)
            if code is None:
                self.kills.append(Kill("everything", **place(self._root, starting=not self._moved)))
            elif code:
                self._failed(life)
            over = code == 0

    def _live(self, life: Shell) -> None:
        """One life until it is to be killed, or has ended by itself."""
        if len(self.kills) >= self._wanted:
            self._until(lambda: False, life, "the end of the run")
        elif self._start_s and self._draw.random() < STARTING:
            end = self._began + self._draw.uniform(0.0, self._start_s)
            self._until(lambda: time.monotonic() > end, life, "the start")
        elif self._until(lambda: self._moved, life, "the first work of this life"):
            share = 1.6 / (self._wanted - len(self.kills) + 1)  # of what is left: enough stays for the other lives
            enough = self._before + self._draw.uniform(1.0, max(1.0, share * (self._total - self._before)))
            self._until(lambda: progress(self._root) >= enough, life, "more work")
            time.sleep(self._draw.uniform(0.0, PAUSE_S))

    def _failed(self, life: Shell) -> None:
        """A life has ended with an error. Raises ServiceError where one after the other does, and nothing else."""
        self.errors.append(life.output.strip().splitlines()[-1])
        print(f"a life ended: {self.errors[-1][:160]}", flush=True)
        self._failures = 0 if self._moved else self._failures + 1
        if self._failures == FAILURES:
            raise ServiceError(f"{FAILURES} lives in a row have done nothing; the last: {life.output[-2000:]}")

    def _until(self, ready: Callable[[], object], life: Shell, what: str) -> bool:
        """As `watch`, with a look each time."""

        def looked() -> object:
            self._look()
            return ready()

        return watch(self._root, looked, lambda: life.code is not None, what)

    def _look(self) -> None:
        """A sample of the accounting. Once this life has moved on, the kills before it have been recovered from."""
        self._accounts.disk()
        if not self._moved and progress(self._root) > self._before:
            self._moved, self._start_s = True, time.monotonic() - self._began
            for kill in self.kills:
                if kill.back_s is None:
                    kill.recovered()

    def _count(self, life: Shell) -> None:
        """The statuses that a life has printed; the last may be cut short."""
        for line in life.output.splitlines():
            with suppress(ValueError):
                if line.startswith("{"):
                    self._accounts.status(json.loads(line))


def kill_clusters(folder: Path, config: RunConfig, accounts: Accounts, kills: int, seed: int) -> Killed:
    """Everything dies at once, again and again. Raises Hang, ServiceError."""
    if reason := unavailable():
        sys.exit(reason)
    (folder / "chaos.yaml").write_text(dump_config(config))
    clusters = Clusters(folder / RUN, config, accounts, kills, seed)
    with Sandbox(folder) as sandbox:
        clusters.run(sandbox)
    return clusters.kills, clusters.errors
