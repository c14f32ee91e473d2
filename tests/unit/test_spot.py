"""Notices of spot machines, against a server that answers as the clouds' do."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator

import pytest
from metadata import Metadata

from rlsf_ray import spot
from rlsf_ray.errors import ServiceError


@pytest.fixture
def server() -> Iterator[Metadata]:
    with Metadata() as made:
        yield made


def test_aws_says_nothing_until_it_names_a_time(server: Metadata) -> None:
    assert spot.aws_notice(server.url) is None
    server.aws = '{"action": "terminate", "time": "2026-11-23T08:22:00Z"}'
    assert spot.aws_notice(server.url) == 1795422120.0
    assert server.tokens == ["AQA", "AQA"]  # each asked for first, as IMDSv2 wants


def test_google_says_that_it_has_begun(server: Metadata) -> None:
    assert spot.gcp_notice(server.url) is None
    server.gcp = "TRUE"
    until = spot.gcp_notice(server.url)
    assert until is not None
    assert until - time.time() == pytest.approx(30.0, abs=5.0)


def test_it_watches_through_silence_until_the_notice_comes(monkeypatch: pytest.MonkeyPatch, server: Metadata) -> None:
    monkeypatch.setattr(spot, "LOOK_S", 0.01)
    drained: list[float] = []
    asked: list[int] = []

    def notice() -> float | None:
        asked.append(1)
        if len(asked) == 2:
            raise OSError("no route")
        return 7.0 if len(asked) == 4 else None

    spot.watch(notice, drained.append)
    assert (drained, len(asked)) == ([7.0], 4)


@pytest.mark.parametrize("error", [ServiceError("no"), ConnectionError("no"), subprocess.TimeoutExpired("ray", 1.0)])
def test_a_ray_that_cannot_be_told_is_told_again(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(spot, "LOOK_S", 0.01)
    told: list[float] = []

    def drain(until: float) -> None:
        told.append(until)
        if len(told) < 3:
            raise error

    spot.watch(lambda: 7.0, drain)
    assert told == [7.0, 7.0, 7.0]


def test_another_error_of_the_metadata_service_is_told(server: Metadata) -> None:
    server.status = 500
    with pytest.raises(OSError, match="500"):
        spot.aws_notice(server.url)
