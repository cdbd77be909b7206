"""OLLAMA_HOST, parsed as Ollama itself parses it (envconfig.Host in ollama/ollama)."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import NamedTuple

from pytest_gpushare.text import printable

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 11434
AUTO = "auto"
"""In place of an address: look for it."""


class Address(NamedTuple):
    """Where to call an Ollama server."""

    scheme: str
    host: str
    """Without brackets; an address to bind (0.0.0.0, ::) is already one to call."""
    port: int
    path: str = ""
    problem: str = ""
    """What was odd in the text; Ollama itself warns and goes on, and so do we."""

    @property
    def shown(self) -> str:
        """`127.0.0.1:11434`, as messages name it."""
        text = printable(self._authority)
        return text if len(text) <= 80 else f"{text[:40]}...{text[-37:]}"

    @property
    def url(self) -> str:
        """The base URL, without a slash at its end."""
        return f"{self.scheme}://{self._authority}{self.path}"

    @property
    def _authority(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """The address that a text such as `http://gpu-box:8080/ollama` or `:1234` means."""
    text = text.strip().strip("\"'").strip()
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "http", text
        default_port = DEFAULT_PORT
    else:
        default_port = {"http": 80, "https": 443}.get(scheme.lower(), DEFAULT_PORT)
    # Names and passwords are not part of Ollama's grammar, and must never be shown or sent. A
    # password may contain a slash, so that all before the last @ goes, wherever it is.
    authority, slash, path = rest.rpartition("@")[2].partition("/")
    host, port_text = _split(authority)
    problem = ""
    port = default_port
    if port_text:
        if re.fullmatch(r"[0-9]{1,9}", port_text) and int(port_text) <= 65535:
            port = int(port_text)
        else:
            problem = f"{port_text[:20]!r} is no port: {default_port} is used"
    return Address(
        scheme="https" if scheme.lower() == "https" else "http",
        host=_callable(host),
        port=port,
        path=f"/{path.strip('/')}" if slash and path.strip("/") else "",
        problem=problem,
    )


def without_secrets(setting: str) -> str:
    """A setting as output may show it: a URL may carry a name, a password or a token."""
    if not setting or setting.strip().lower() == AUTO:
        return setting
    return parse_address(setting).shown


def _callable(host: str) -> str:
    """The host to call for one to bind: loopback for every address, or for none."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host or DEFAULT_HOST
    if not address.is_unspecified:
        return host
    return DEFAULT_HOST if address.version == 4 else "::1"


def _split(authority: str) -> tuple[str, str]:
    """(host, port) of `host`, `host:port`, `[v6]`, `[v6]:port` or a bare IPv6 address."""
    if authority.startswith("["):
        host, _, rest = authority[1:].partition("]")
        return host, rest.removeprefix(":")
    if authority.count(":") > 1:
        return authority, ""
    host, _, port = authority.partition(":")
    return host, port


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
    from pytest_gpushare.gpu.host import wsl_gateway

    names = {DEFAULT_HOST: "loopback", "host.docker.internal": "host.docker.internal"}
    gateway = wsl_gateway()
    if gateway is not None:
        names[gateway] = "the WSL gateway"
    found = [Candidate(parse_address(written), VARIABLE)] if written.strip() else []
    found += [Candidate(parse_address(host), how) for host, how in names.items()]
    # Of two with the same address the first says how it was found.
    places = {(c.address.scheme, c.address.host, c.address.port): c for c in reversed(found)}
    return tuple(candidate for candidate in found if candidate in places.values())
