"""The login to a host for its probe and its samples: an ssh process, and lines of JSON.

Nothing here waits without a limit, and what arrives is bounded.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from pytest_gpushare.hosts.answers import HostError
from pytest_gpushare.hosts.specs import NO_DIRECTORY, HostSpec, login
from pytest_gpushare.text import one_line

START_LIMIT = 10.0
"""Seconds that all hosts together have to answer at the start."""

SILENCE = 20.0
"""Seconds without a word after which a host counts as gone."""

_PREFIX = b"gpu-share:"
_LONGEST_LINE = 16 * 1024 * 1024
_MOST_NOISE = 1024 * 1024
"""Bytes that a host may print before, and between, its words."""
_MOST_WAITING = 1000
_MOST_ERRORS = 20
_END = 1.0

_BOOTSTRAP = Path(__file__).with_name("bootstrap.py")


class HostConnection:
    """The login to one host. Messages of it are handed on in a thread of its own."""

    def __init__(self, spec: HostSpec, request: Mapping[str, Any]) -> None:
        self.spec = spec
        self.name = spec.name
        self.begun = self.last_message_at = time.monotonic()
        """When its last message came, on the monotonic clock."""
        self.problem = ""
        """Why it is over; empty while it is not."""
        self._handler: Callable[[dict[str, Any]], object] | None = None
        self._early: deque[dict[str, Any]] = deque(maxlen=_MOST_WAITING)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._closed = False
        self._errors: deque[str] = deque(maxlen=_MOST_ERRORS)
        self._lines: queue.Queue[bytes | None] = queue.Queue(_MOST_WAITING)
        try:
            self._process = subprocess.Popen(
                login(spec),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                # Ctrl-C is for pytest, which ends the run in order.
                start_new_session=True,
            )
        except OSError as error:
            raise HostError(
                f"{self.name}: ssh cannot be started: {error.strerror}: install OpenSSH's client"
            ) from None
        source = _BOOTSTRAP.read_text(encoding="utf-8")
        self._lines.put(repr(source).encode() + b"\n" + json.dumps(dict(request)).encode() + b"\n")
        self._threads = [
            threading.Thread(target=target, name=f"gpu-share-host-{name}", daemon=True)
            for name, target in (("in", self._read), ("out", self._write), ("err", self._complain))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return bool(self.problem)

    def listen(self, handler: Callable[[dict[str, Any]], object]) -> None:
        """Hand each message on from now on, those that came already first."""
        with self._lock:
            early = list(self._early)
            self._early.clear()
            self._handler = handler
        for message in early:
            handler(message)

    def next(self, until: float) -> dict[str, Any] | None:
        """The next message, before anybody listens; None where none comes until then."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._early or self.problem, max(0.0, until - time.monotonic())
            )
            return self._early.popleft() if self._early else None

    @property
    def is_closed(self) -> bool:
        """Whether it was ended here."""
        return self._closed

    def wait(self, seconds: float) -> None:
        """Wait for its end, at most for so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self.problem), seconds)

    def say(self, line: str) -> None:
        """Send a line; one that cannot be sent now is dropped."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(line.encode() + b"\n")

    def close(self) -> None:
        """End the login, and what it runs; harmless when called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self.problem = self.problem or "closed"
            self._changed.notify_all()
        self.say("end")
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
        try:
            self._process.wait(_END)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(OSError):
            self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END)

    def failure(self) -> str:
        """Why the login ended before it was to, in words: ssh's own where it has some."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END)
        # Its last words may still be on their way.
        self._threads[2].join(_END)
        code = self._process.returncode
        words = self._errors[-1] if self._errors else ""
        if code == 255:
            return words or "ssh cannot log in"
        if code == NO_DIRECTORY:
            return f"there is no directory {one_line(self.spec.chdir, 200)}"
        if code in (126, 127):
            python = one_line(self.spec.python, 200) or ".venv/bin/python or python3"
            return f"{python} cannot be started there{f': {words}' if words else ''}"
        return words or f"the Python there has ended (exit code {code})"

    def _read(self) -> None:
        assert self._process.stdout is not None
        problem = "it has closed the connection"
        try:
            with self._process.stdout as stdout:
                problem = self._receive(stdout) or problem
        except (ValueError, RecursionError):
            problem = "it answers nonsense"
        except OSError:
            pass
        with self._changed:
            self.problem = self.problem or problem
            self._changed.notify_all()

    def _receive(self, stdout: IO[bytes]) -> str:
        """Hand on its messages until it ends; why no more of them is read before."""
        noise = 0
        while line := stdout.readline(_LONGEST_LINE):
            if line.startswith(_PREFIX):
                message = json.loads(line[len(_PREFIX) :])
                if not isinstance(message, dict):
                    raise ValueError("no object")
                self._take(message)
            elif (noise := noise + len(line)) > _MOST_NOISE:
                return "it prints too much in addition to its answers"
        return ""

    def _take(self, message: dict[str, Any]) -> None:
        with self._changed:
            self.last_message_at = time.monotonic()
            handler = self._handler
            # Nobody needs a sample of before the run.
            if handler is None and message.get("kind") != "sample":
                self._early.append(message)
                self._changed.notify_all()
        if handler is not None:
            handler(message)

    def _write(self) -> None:
        assert self._process.stdin is not None
        # A host that is gone reads nothing: the reader sees its end.
        with contextlib.suppress(OSError), self._process.stdin as stdin:
            while (line := self._lines.get()) is not None:
                stdin.write(line)
                stdin.flush()

    def _complain(self) -> None:
        assert self._process.stderr is not None
        with contextlib.suppress(OSError), self._process.stderr as stderr:
            while line := stderr.readline(4096):
                text = one_line(line.decode("utf-8", "replace"), 300)
                if text:
                    self._errors.append(text)
