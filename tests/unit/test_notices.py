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

from actors.notices import Notices

NEWS = [{"event": "guard", "text": "stop at version 3"}, {"event": "done", "text": "done at version 4"}]


class Server(ThreadingHTTPServer):
    taken: list[Any]
    refusals: int


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        refused, self.server.refusals = self.server.refusals > 0, self.server.refusals - 1
        if not refused:
            self.server.taken.append(json.loads(body))
        self.send_response(500 if refused else 200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as made:
        made.taken, made.refusals = [], 0
        Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


def tell(url: str | None, *news: list[dict[str, str]]) -> None:
    async def play() -> None:
        notices = Notices("mine", url)
        for some in news:
            notices.tell(some)
        await notices.ended()

    asyncio.run(play())


@pytest.mark.parametrize("refusals", [0, 2])
def test_all_are_told_in_order_even_if_some_have_to_be_told_again(server: Server, refusals: int) -> None:
    server.refusals = refusals
    tell(f"http://127.0.0.1:{server.server_port}/hook", NEWS[:1], [], NEWS[1:])
    assert server.taken == [
        {"run": "mine", "event": "guard", "text": "mine: stop at version 3"},
        {"run": "mine", "event": "done", "text": "mine: done at version 4"},
    ]


def test_a_webhook_that_is_not_there_ends_nothing_and_its_url_is_in_no_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        tell("http://127.0.0.1:1/a-secret", NEWS)
    assert "did not take a notice (guard)" in caplog.text
    assert "a-secret" not in caplog.text


def test_without_a_webhook_nothing_is_sent() -> None:
    tell(None, NEWS)
