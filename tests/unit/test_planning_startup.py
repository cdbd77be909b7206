"""Both probes together: what is left behind when one of them gives no answer."""

from __future__ import annotations

import threading

import pytest
from simulator.child import wait_for
from simulator.ollama import FaultyServer

from pytest_gpushare.planning.startup import probe

from .test_planning_sizing import DEFAULTS


@pytest.mark.parametrize("mode", ["silent", "drip-header", "drip-body"])
def test_no_thread_is_left_behind(mode: str) -> None:
    """Given up on, a server that drips its answer for ever does not keep a thread for ever."""
    before = _ours()
    with FaultyServer(mode) as server:
        facts = probe(DEFAULTS._replace(ollama_host=server.host), ("24GB",)).ollama
        assert facts.problem == "no answer within 0.5 s"
        wait_for(lambda: _ours() <= before)


def _ours() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("gpu-share")}
