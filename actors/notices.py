"""Tells a webhook what the operator of a run wants to hear of at once: guard, quarantine, end."""

from __future__ import annotations

import asyncio
import json
import logging
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any

from rlsf_ray.records import Json

logger = logging.getLogger(__name__)

WAITS_S = (0.0, 1.0, 3.0)  # before each try
ANSWER_S = 5.0
LAST_S = 8.0  # for what is still to be told when the run ends


class Notices:
    """POSTs each notice to `url` as JSON, in order, beside the run. A webhook that fails is logged, and ends nothing.

    The URL is a secret of most services: it appears in no log.
    """

    def __init__(self, run: str, url: str | None) -> None:
        self._run, self._url = run, url
        self._last: asyncio.Task[None] | None = None

    def tell(self, news: Sequence[Json]) -> None:
        """Send {"event", "text"} of each, with the run's name."""
        if self._url is not None and news:
            self._last = asyncio.create_task(self._send(self._last, list(news)))

    async def ended(self) -> None:
        """Return once all is told, or after a few seconds."""
        if self._last is not None:
            await asyncio.wait({self._last}, timeout=LAST_S)

    async def _send(self, before: asyncio.Task[None] | None, news: Sequence[Json]) -> None:
        if before is not None:
            await asyncio.wait({before})
        for one in news:
            text = f"{self._run}: {one['text']}"  # `text` is what chat services show
            body = json.dumps({"run": self._run, "event": one["event"], "text": text}).encode()
            await self._until_taken(one["event"], body)

    async def _until_taken(self, event: str, body: bytes) -> None:
        for wait_s in WAITS_S:
            await asyncio.sleep(wait_s)
            try:
                return await asyncio.to_thread(_post, str(self._url), body)
            except (OSError, HTTPException, ValueError) as error:  # whose text may hold the URL
                logger.warning("the webhook did not take a notice (%s): %s", event, type(error).__name__)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would make a GET of the notice."""

    def redirect_request(self, *args: Any) -> None:
        return None


def _post(url: str, body: bytes) -> None:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method="POST")
    with urllib.request.build_opener(_NoRedirect).open(request, timeout=ANSWER_S):
        pass
