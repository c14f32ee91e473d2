"""Notices to a webhook: a real server takes them in order; one that is not there ends nothing and is not shown."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from actors import notices
from actors.notices import Notices

NEWS = [{"event": "guard", "text": "stop at version 3"}, {"event": "done", "text": "done at version 4"}]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "WAITS_S", (0.0, 0.0, 0.0))


class Server(ThreadingHTTPServer):
    taken: list[Any]
    refusals: int
    refusal: int


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        refused, self.server.refusals = self.server.refusals > 0, self.server.refusals - 1
        if not refused:
            self.server.taken.append(json.loads(body))
        self.send_response(self.server.refusal if refused else 200)
        self.send_header("Location", "/elsewhere")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as made:
        made.taken, made.refusals, made.refusal = [], 0, 500
        Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


def tell(url: str | None, *news: list[dict[str, str]]) -> None:
    async def play() -> None:
        made = Notices("mine", url)
        for some in news:
            made.tell(some)
        await made.ended()

    asyncio.run(play())


@pytest.mark.parametrize(("refusals", "refusal"), [(0, 0), (2, 500), (2, 302)])
def test_all_are_told_in_order_even_if_some_have_to_be_told_again(server: Server, refusals: int, refusal: int) -> None:
    server.refusals, server.refusal = refusals, refusal
    tell(f"http://127.0.0.1:{server.server_port}/hook", NEWS[:1], [], NEWS[1:])
    assert server.taken == [
        {"run": "mine", "event": "guard", "text": "mine: stop at version 3"},
        {"run": "mine", "event": "done", "text": "mine: done at version 4"},
    ]


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/a-secret", "http://127.0.0.1:1/a secret a-secret"])
def test_a_webhook_that_is_not_there_ends_nothing_and_its_url_is_in_no_log(
    caplog: pytest.LogCaptureFixture, url: str
) -> None:
    with caplog.at_level(logging.INFO):
        tell(url, NEWS)
    assert "did not take a notice (guard)" in caplog.text
    assert "a-secret" not in caplog.text


def test_without_a_webhook_nothing_is_sent() -> None:
    tell(None, NEWS)
