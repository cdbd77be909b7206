"""What runs beside the tests, and ends with them or at SIGTERM."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable
from typing import Any, Generic, Protocol, TypeVar


class Service(Protocol):
    """Something that runs beside the tests, from before the first to after the last."""

    def start(self) -> None:
        """Begin; threads are daemons."""

    def stop(self) -> None:
        """End within a second or so, and leave nothing behind."""


S = TypeVar("S", bound=Service)


class AtSigterm(Generic[S]):
    """A service that is stopped by SIGTERM, too, by which pytest would end at once."""

    def __init__(self, service: S) -> None:
        self.service = service
        self._before: Any = None
        """The handler before; None where there is none of ours."""

    def start(self) -> None:
        """Start the service, and handle the signal unless somebody else does; harmless twice."""
        self.service.start()
        if self._before is not None or threading.current_thread() is not threading.main_thread():
            return
        found = signal.getsignal(signal.SIGTERM)
        if found is signal.SIG_DFL or isinstance(getattr(found, "__self__", None), AtSigterm):
            self._before = found
            signal.signal(signal.SIGTERM, self._end)

    def stop(self) -> None:
        """Stop the service, and leave the signal to whoever had it; harmless twice."""
        if self._before is not None and signal.getsignal(signal.SIGTERM) == self._end:
            signal.signal(signal.SIGTERM, self._before)
        self.service.stop()

    def _end(self, number: int, _frame: object) -> None:
        self.service.stop()
        signal.signal(number, self._before)
        signal.raise_signal(number)


class Services:
    """The services of one run, in the order in which they start."""

    def __init__(self, services: Iterable[Service], problem: Callable[[str], object]) -> None:
        """`problem` is called with a sentence for each that could not start or stop."""
        self._services = list(services)
        self._problem = problem

    def start(self) -> None:
        """Start all; one that fails is reported and left out."""
        for service in list(self._services):
            try:
                service.start()
            except Exception as error:
                self._services.remove(service)
                self._problem(f"{_name(service)} could not start: {error}")

    def include(self, service: Service) -> None:
        """Start one more with the others."""
        self._services.append(service)

    def add(self, service: Service) -> None:
        """Start one more, and stop it before the others."""
        service.start()
        self._services.append(service)

    def runs(self, service: Service) -> bool:
        """Whether a service has not been stopped."""
        return service in self._services

    def stop(self) -> None:
        """Stop all, the last first; harmless when called twice."""
        while self._services:
            service = self._services.pop()
            try:
                service.stop()
            except Exception as error:
                self._problem(f"{_name(service)} could not stop: {error}")


def _name(service: Service) -> str:
    """The name of a service in messages."""
    return type(getattr(service, "service", service)).__name__.lower()
