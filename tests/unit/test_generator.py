"""A generator's versions: proved before they are used, kept while they are in use, loaded twice at most."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_config

from actors.cores import Cores
from actors.generator import Generator
from rlsf_ray.config_sections import PoolConfig
from rlsf_ray.errors import EngineError, WeightsError
from rlsf_ray.records import Canary, FloatArray, WeightsVersion


class Engine:
    """Its log-probs are the number of the version; `deaf` loads of a version change nothing."""

    one_version = False

    def __init__(self, deaf: dict[int, int] | None = None) -> None:
        self.deaf, self.held, self.loads = deaf or {}, dict[int, float](), list[int]()
        self.living = True

    def load_version(self, version: int, adapter: Any) -> str:
        self.loads.append(version)
        self.deaf[version] = self.deaf.get(version, 0) - 1
        self.held[version] = -float(version - 1 if self.deaf[version] >= 0 else version)
        return f"sum {version}"

    def forget_version(self, version: int) -> None:
        self.held.pop(version, None)

    def logprobs(self, texts: Any, version: int) -> list[FloatArray]:
        if not self.living:
            raise EngineError("dead")
        return [np.full(4, self.held[version] if version else 0.0, dtype=np.float32) for _ in texts]

    def alive(self) -> bool:
        return self.living

    def close(self) -> None:
        pass


class Small(Generator):
    """Without Ray: versions come from here. `built` engines are used one after the other."""

    def __init__(self, *built: Engine) -> None:
        super().__init__(None, "generator-0")  # type: ignore[arg-type]
        self._built, self._config, self._cores = list(built), tiny_config(Path("m")), Cores(PoolConfig(threads=1))

    def _build(self) -> None:
        self._engine = self._engine or self._built.pop(0)

    def _fetch(self, version: int) -> tuple[WeightsVersion, int, Any, list[Canary]]:
        ids, move = np.arange(4, dtype=np.int32), np.ones(4, dtype=np.float32)
        canary = Canary(prompt_ids=ids, token_ids=ids, before=-(version - 1) * move, after=-version * move)
        return WeightsVersion(version=version, checksum=f"sum {version}", path=""), version - 1, {}, [canary]


def test_a_version_that_arrives_is_proved_and_the_oldest_is_dropped() -> None:
    generator = Small(Engine())
    swaps = [generator.load_version(version) for version in (1, 2, 3)]
    assert [(swap or {})["verdict"] for swap in swaps] == ["proved"] * 3
    assert generator._engine.held.keys() == {2, 3}
    assert generator.load_version(3) is None


def test_a_version_that_does_not_arrive_is_loaded_once_more() -> None:
    generator = Small(Engine({2: 1}))
    assert (generator.load_version(2) or {})["verdict"] == "proved"
    assert generator._engine.loads == [1, 2, 1, 2]  # with the one before it, the yardstick


def test_a_version_that_a_batch_had_to_bring_in_is_told_with_the_batch() -> None:
    generator = Small(Engine({2: 1}))
    with generator._writing(2) as (_, news):
        assert (news["swap"]["version"], news["swap"]["verdict"], news["swap"]["loads"]) == (2, "proved", 2)
    with generator._writing(2) as (_, news):
        assert news == {}


def test_a_version_that_does_not_arrive_twice_ends_the_run_with_both_numbers() -> None:
    generator = Small(Engine({1: 2}))
    with pytest.raises(WeightsError, match=r"version 1 in twice, .* moved by 0.00 of the trainer's move of 1 nats"):
        generator.load_version(1)
    assert generator._engine.held == {}
    assert generator._versions == []


def test_a_version_in_use_stays_while_newer_ones_come_and_needs_no_lock_to_be_used() -> None:
    generator = Small(Engine())
    generator.load_version(1)
    with generator._writing(1):
        for version in (2, 3):
            generator.load_version(version)
        assert 1 in generator._engine.held
        with generator._loading:  # as while a version is on its way in
            done = threading.Event()

            def write() -> None:
                with generator._writing(1):
                    done.set()

            threading.Thread(target=write, daemon=True).start()
            assert done.wait(30)
    generator.load_version(4)
    assert generator._engine.held.keys() == {3, 4}


def test_an_older_version_can_be_taken_in_beside_newer_ones() -> None:
    generator = Small(Engine())
    for version in (1, 2, 3, 4):
        generator.load_version(version)
    assert (generator.load_version(2) or {})["verdict"] == "proved"  # needs version 1 for its proof


def test_a_dead_engine_is_built_anew_with_the_version_that_is_asked_for() -> None:
    first, second = Engine(), Engine()
    generator = Small(first, second)
    generator.load_version(1)
    first.living = False

    def write() -> None:
        with generator._writing(1) as (engine, _):
            engine.logprobs([0], 1)

    with pytest.raises(EngineError, match="dead"):
        write()
    write()
    assert second.loads == [1]


def test_a_batch_takes_a_newer_version_only_where_one_can_be_in_at_a_time() -> None:
    """So that a batch that waited for a version to come in does not have the old one brought back."""
    engine = Engine()
    generator = Small(engine)
    for version in (1, 2):
        generator.load_version(version)
    assert generator._newest(1) == 1
    engine.one_version = True
    assert generator._newest(1) == 2
    with ThreadPoolExecutor(1) as threads:
        with generator._changing:  # version 3 is going in
            waiting = threads.submit(generator._newest, 2)
            with pytest.raises(TimeoutError):
                waiting.result(0.2)
            generator._take_in(3)
        assert waiting.result(30) == 3


def test_batches_go_on_with_the_old_version_until_the_new_one_goes_in() -> None:
    engine, reading, go_on = Engine(), threading.Event(), threading.Event()
    engine.one_version = True
    generator = Small(engine)
    generator.load_version(1)
    read = engine.logprobs

    def slow(texts: Any, version: int) -> list[FloatArray]:
        if version == 1:  # the yardstick, before version 2 goes in
            reading.set()
            assert go_on.wait(30)
        return read(texts, version)

    engine.logprobs = slow  # type: ignore[method-assign]
    with ThreadPoolExecutor(2) as threads:
        loading = threads.submit(generator.load_version, 2)
        assert reading.wait(30)
        assert threads.submit(generator._newest, 1).result(30) == 1
        go_on.set()
        assert (loading.result(30) or {})["verdict"] == "proved"
    assert generator._newest(1) == 2
