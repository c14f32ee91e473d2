"""A metadata service as spot machines of AWS and Google Cloud have it."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "AQA"


class Metadata(ThreadingHTTPServer):
    """A context manager. `aws` and `gcp`: what it says; `status`: of every answer."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.aws, self.gcp, self.status = "", "FALSE", 200
        self.tokens: list[str] = []  # that came with a question

    def __enter__(self) -> Metadata:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.shutdown()
        super().__exit__(*error)


class _Handler(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        self._answer(TOKEN if self.path == "/latest/api/token" else "")

    def do_GET(self) -> None:
        if self.path == "/latest/meta-data/spot/instance-action":
            self.server.tokens.append(self.headers["X-aws-ec2-metadata-token"])
            self._answer(self.server.aws)
        elif self.path == "/computeMetadata/v1/instance/preempted" and self.headers["Metadata-Flavor"] == "Google":
            self._answer(self.server.gcp)
        else:
            self._answer("")

    def _answer(self, text: str) -> None:
        self.send_response(self.server.status if text or self.server.status != 200 else 404)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass
