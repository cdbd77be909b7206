"""ToyServe: an HTTP server that holds VRAM of the simulated machine, in a process of its own.

`python server.py PORT HELD MOST` holds so much of the first device. `POST /hold?size=5GB` has it
hold that instead, with `&until=PATH` until that file is there.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

sys.path.insert(0, str(Path(__file__).parents[1]))

from simulator import Machine
from simulator.sizes import to_bytes


class Holding:
    """What the server holds."""

    def __init__(self, size: str, most: str) -> None:
        self.most = to_bytes(most)
        self.size = to_bytes(size)
        self._first = self.size
        self._machine = Machine.open()
        self._handle = self._machine.allocate(0, self.size, context="1GB")

    def hold(self, size: int) -> None:
        """Give back what is held, and take so many bytes."""
        self._machine.release(self._handle)
        self.size, self._handle = size, self._machine.allocate(0, size)

    def hold_until(self, size: int, path: Path) -> None:
        """The same until a file is there; then what it held first."""
        self.hold(size)
        threading.Thread(target=self._give_back, args=(path,), daemon=True).start()

    def _give_back(self, path: Path) -> None:
        while not path.exists():
            time.sleep(0.02)
        self.hold(self._first)


class Handler(BaseHTTPRequestHandler):
    """Answers requests."""

    holding: Holding

    def do_GET(self) -> None:
        """`/status`."""
        self._answer({"version": "1.2", "held": self.holding.size, "most": self.holding.most})

    def do_POST(self) -> None:
        """`/hold`."""
        asked = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        size = to_bytes(asked["size"])
        if "until" in asked:
            self.holding.hold_until(size, Path(asked["until"]))
        else:
            self.holding.hold(size)
        self._answer({})

    def _answer(self, document: object) -> None:
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


if __name__ == "__main__":
    port, held, most = sys.argv[1:]
    Handler.holding = Holding(held, most)
    ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()
