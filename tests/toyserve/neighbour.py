"""ToyServe as a neighbour: a server at the address in the variable TOYSERVE."""

from __future__ import annotations

import time
from collections.abc import Mapping

from pytest_gpushare.config.settings import Settings
from pytest_gpushare.gpu.host import command_line, is_own_address
from pytest_gpushare.neighbours import Neighbour, ServerFacts
from pytest_gpushare.ollama.address import parse_address
from pytest_gpushare.ollama.client import (
    Connection,
    NonsenseError,
    UnreachableError,
)
from pytest_gpushare.text import one_line

_PATIENCE = 5.0
"""Seconds for its answer."""


class ToyServe(Neighbour):
    """See `Neighbour`."""

    name = "ToyServe"
    limit = 10.0

    def ask(self, _settings: Settings, environment: Mapping[str, str]) -> ServerFacts:
        """What `GET /status` says: its version, what it holds, and what it may come to hold."""
        given = environment.get("TOYSERVE", "")
        if not given:
            return ServerFacts()
        address = parse_address(given)
        silent = ServerFacts(address.shown, asked=True, on_this_host=is_own_address(address.host))
        connection = Connection(address)
        try:
            status = connection.get("/status", time.monotonic() + _PATIENCE).decoded()
        except (NonsenseError, TimeoutError, UnreachableError) as error:
            return silent._replace(problem=str(error) or "nothing listens there")
        finally:
            connection.close()
        match status:
            case {"version": str(version), "held": int(held), "most": int(most)}:
                version = one_line(version, 40)
                return silent._replace(answered=True, version=version, vram=held, keep=most)
        return silent._replace(problem="/status gives something else than ToyServe's")

    def owns(self, pid: int) -> bool:
        """Its processes run `toyserve/server.py`."""
        return any(each.endswith("toyserve/server.py") for each in command_line(pid) or ())
