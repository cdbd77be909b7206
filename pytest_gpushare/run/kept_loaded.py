"""The models that we loaded: kept until the tests are over, then left as Ollama keeps any."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from pytest_gpushare.probe.address import Address
from pytest_gpushare.probe.exchange import Connection
from pytest_gpushare.probe.facts import LoadedModel
from pytest_gpushare.run.preload import KEEP_ALIVE, ask, set_keep_alive

RENEW = 1800.0
"""Seconds between renewals, half of what Ollama is told."""

RESTORE_LIMIT = 3.0
"""Seconds that the end of the run waits for it."""

_USUAL = "5m"
"""What Ollama takes where its OLLAMA_KEEP_ALIVE is not set."""


class KeptLoaded:
    """The service that renews the keep-alive of our models, and gives it back at the end."""

    def __init__(
        self, server: Address, ours: Sequence[LoadedModel], usual: str | int = _USUAL
    ) -> None:
        """`usual` is the keep-alive that they get back."""
        self._server, self._ours, self._usual = server, list(ours), usual
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._is_restored = False

    def start(self) -> None:
        """Renew from now on."""
        threading.Thread(target=self._renew, name="gpu-share-keep", daemon=True).start()

    def stop(self) -> None:
        """Give the keep-alive back; harmless when called twice."""
        self._stop.set()
        with self._lock:
            if self._is_restored:
                return
            self._is_restored = True
        until = time.monotonic() + RESTORE_LIMIT
        connections: list[Connection] = []
        thread = threading.Thread(
            target=self._tell,
            args=(self._usual, until, connections.append),
            name="gpu-share-restore",
            daemon=True,
        )
        thread.start()
        thread.join(RESTORE_LIMIT)
        for connection in connections if thread.is_alive() else ():
            with contextlib.suppress(Exception):
                connection.close()

    def _renew(self) -> None:
        while not self._stop.wait(RENEW):
            self._tell(KEEP_ALIVE, time.monotonic() + 60.0, lambda _: None)

    def _tell(
        self, keep_alive: str | int, until: float, opened: Callable[[Connection], object]
    ) -> None:
        # A server that is gone, or busy, keeps nothing that could be put right.
        with contextlib.suppress(Exception):
            there = {model.name: model for model in ask(self._server, until, opened)}
            for ours in self._ours:
                # One that somebody sent away, or loaded with other options, is theirs now: a
                # request of ours would load it once more.
                if _is_same(there.get(ours.name), ours):
                    set_keep_alive(self._server, ours.name, keep_alive, until, opened)


def usual_keep_alive(environment: Mapping[str, str]) -> str | int:
    """OLLAMA_KEEP_ALIVE, where it is set here as it should be for the server; else 5 minutes."""
    text = environment.get("OLLAMA_KEEP_ALIVE", "").strip().strip("\"'")
    if re.fullmatch(r"-?[0-9]{1,9}", text):
        return int(text)
    if re.fullmatch(r"-?([0-9]{1,9}(\.[0-9]{1,9})?(ns|us|µs|ms|s|m|h))+", text):
        return text
    return _USUAL


def _is_same(now: LoadedModel | None, ours: LoadedModel) -> bool:
    if now is None:
        return False
    return (now.digest, now.context, now.size) == (ours.digest, ours.context, ours.size)
