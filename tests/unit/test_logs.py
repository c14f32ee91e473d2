"""Log lines: on standard error for whoever watches, and as JSON in the run directory."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlsf_ray import logs
from rlsf_ray.logs import Tail, log_line, roles, setup_logging

logger = logging.getLogger("rlsf_ray.anything")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    for name in ("rlsf_ray", "actors"):
        for handler in list(logging.getLogger(name).handlers):
            logging.getLogger(name).removeHandler(handler)
            handler.close()


def test_log_lines_carry_role_and_run_and_come_once(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("scorer", "first")
    setup_logging("trainer", "100%")
    logger.info("hello")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("INFO [trainer 100%] rlsf_ray.anything: hello")


def test_the_run_directory_keeps_them_as_json_and_gives_them_back_in_order(tmp_path: Path) -> None:
    for role in ("generator-0", "coordinator", "generator-0"):  # as if restarted
        setup_logging(role, "mine", root=str(tmp_path))
        logger.info("from %s", role)
    try:
        raise ValueError("of a kind")
    except ValueError:
        logger.exception("it broke")
    with (tmp_path / "logs/coordinator.jsonl").open("a") as file:
        file.write('{"time": 1, "lev')  # killed while it wrote
    setup_logging("coordinator", "mine", root=str(tmp_path))
    logger.info("again, with \u2028, \udc80 and\na second line")
    rows = Tail(str(tmp_path))()
    assert [row["role"] for row in rows] == ["generator-0", "coordinator", "generator-0", "generator-0", "coordinator"]
    assert [row["message"] for row in Tail(str(tmp_path), "coordinator")()] == [
        "from coordinator",
        "again, with \u2028, \udc80 and\na second line",
    ]
    assert log_line(rows[3]).endswith("ValueError: of a kind")
    assert rows[0].keys() == {"time", "level", "role", "run", "logger", "message"}
    assert roles(str(tmp_path)) == ["coordinator", "generator-0"]


def test_a_tail_gives_each_line_once_whatever_is_rotated_or_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_FILE_BYTES", 2000)
    tail, seen = Tail(str(tmp_path)), list[str]()
    setup_logging("scorer-0", "mine", root=str(tmp_path))
    for number in range(30):
        logger.info("m%d", number)
        if number % 5 == 4:
            seen += [row["message"] for row in tail()]
    assert seen == [f"m{number}" for number in range(30)]
    late = {"time": 1.0, "level": "INFO", "role": "b", "run": "mine", "logger": "x", "message": "late"}
    (tmp_path / "logs/b.jsonl").write_text(json.dumps(late) + "\n")  # of a node whose clock is behind
    assert [row["message"] for row in tail()] == ["late"]
    assert tail() == []


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    setup_logging("scorer", "mine", root=str(tmp_path))
    logger.info("hello")
    assert "hello" in capsys.readouterr().err
