"""Where Ollama may be: one address, or with `ollama_host = auto` several that are tried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pytest_gpushare.probe.address import AUTO, DEFAULT_HOST, Address, parse_address

VARIABLE = "OLLAMA_HOST"


class Candidate(NamedTuple):
    """An address, and how it came to be asked."""

    address: Address
    found_by: str
    """The setting or variable that names it, or what was tried."""


def candidates(setting: str, environment: Mapping[str, str]) -> tuple[Candidate, ...]:
    """The addresses to ask, the best first; one alone unless the setting is `auto`."""
    written = environment.get(VARIABLE, "")
    if setting.strip().lower() == AUTO:
        return _to_try(written)
    if setting:
        return (Candidate(parse_address(setting), "gpu_share_ollama_host"),)
    return (Candidate(parse_address(written), VARIABLE if written.strip() else "default"),)


def _to_try(written: str) -> tuple[Candidate, ...]:
    from pytest_gpushare.probe.host import wsl_gateway

    names = {DEFAULT_HOST: "loopback", "host.docker.internal": "host.docker.internal"}
    gateway = wsl_gateway()
    if gateway is not None:
        names[gateway] = "the WSL gateway"
    found = [Candidate(parse_address(written), VARIABLE)] if written.strip() else []
    found += [Candidate(parse_address(host), how) for host, how in names.items()]
    # The first of two that are the same place tells how it was found.
    places = {(c.address.scheme, c.address.host, c.address.port): c for c in reversed(found)}
    return tuple(candidate for candidate in found if candidate in places.values())
