"""OLLAMA_HOST, parsed as Ollama parses it, and which hosts are this machine."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulator.ollama import FaultyServer

from pytest_gpushare.gpu.host import is_own_address
from pytest_gpushare.ollama.address import parse_address, without_secrets
from pytest_gpushare.ollama.catalog import ask

DEFAULT = "http://127.0.0.1:11434"

# The rows up to the rule are those of Ollama's own test of OLLAMA_HOST.
ADDRESSES = {
    "": DEFAULT,
    "1.2.3.4": "http://1.2.3.4:11434",
    "1.2.3.4:1234": "http://1.2.3.4:1234",
    "example.com": "http://example.com:11434",
    "example.com:1234": "http://example.com:1234",
    ":1234": "http://127.0.0.1:1234",
    "[::1]": "http://[::1]:11434",
    "[::1]:1337": "http://[::1]:1337",
    " 1.2.3.4 ": "http://1.2.3.4:11434",
    '"1.2.3.4"': "http://1.2.3.4:11434",
    '" 1.2.3.4 "': "http://1.2.3.4:11434",
    "'1.2.3.4'": "http://1.2.3.4:11434",
    "http://1.2.3.4": "http://1.2.3.4:80",
    "http://1.2.3.4:4321": "http://1.2.3.4:4321",
    "https://1.2.3.4": "https://1.2.3.4:443",
    "https://1.2.3.4:4321": "https://1.2.3.4:4321",
    "https://example.com/ollama": "https://example.com:443/ollama",
    "https://example.com:1234/ollama": "https://example.com:1234/ollama",
    "example.com/ollama": "http://example.com:11434/ollama",
    "example.com:1234/ollama": "http://example.com:1234/ollama",
    # ---
    "http://": "http://127.0.0.1:80",
    "https://:8443": "https://127.0.0.1:8443",
    "HTTPS://gpu-box": "https://gpu-box:443",
    "ftp://gpu-box": "http://gpu-box:11434",
    "example.com/": "http://example.com:11434",
    "example.com/a/b/": "http://example.com:11434/a/b",
    "0.0.0.0": DEFAULT,
    "0.0.0.0:1234": "http://127.0.0.1:1234",
    "http://0.0.0.0": "http://127.0.0.1:80",
    "::": "http://[::1]:11434",
    "[::]:1234": "http://[::1]:1234",
    "[0:0:0:0:0:0:0:0]:1234": "http://[::1]:1234",
    "::1": "http://[::1]:11434",
    "fe80::1:2:3": "http://[fe80::1:2:3]:11434",
    "localhost:0": "http://localhost:0",
    "localhost:": "http://localhost:11434",
    "localhost:011434": "http://localhost:11434",
    "user:secret@gpu-box:1234": "http://gpu-box:1234",
    "https://user:secret@gpu-box/x": "https://gpu-box:443/x",
    "http://user:secret/rest@gpu-box": "http://gpu-box:80",
    "user:sec/ret:8@gpu-box:1234/x": "http://gpu-box:1234/x",
}


@pytest.mark.parametrize("text", ADDRESSES)
def test_parse(text: str) -> None:
    """The same address that Ollama itself would bind or call."""
    address = parse_address(text)
    assert (address.url, address.problem) == (ADDRESSES[text], "")


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("1.2.3.4:66000", "http://1.2.3.4:11434"),
        ("1.2.3.4:-1", "http://1.2.3.4:11434"),
        ("1.2.3.4:x", "http://1.2.3.4:11434"),
        ("1.2.3.4:1x", "http://1.2.3.4:11434"),
        ("http://1.2.3.4:66000", "http://1.2.3.4:80"),
        ("https://1.2.3.4:x", "https://1.2.3.4:443"),
        ("[::1]:99999999999999999999", "http://[::1]:11434"),
        ("gpu-box:١", "http://gpu-box:11434"),
    ],
)
def test_bad_port(text: str, url: str) -> None:
    """The default port, with a word on it, as Ollama warns and goes on."""
    address = parse_address(text)
    assert address.url == url
    assert address.problem.endswith(f" is no port: {address.port} is used")


@given(st.text(max_size=60) | st.text("[]:/@.0123456789a \"'", max_size=20))
def test_any_text(text: str) -> None:
    """Whatever stands there, there is an address with a port and one line to show."""
    address = parse_address(text)
    assert 0 <= address.port <= 65535
    assert address.host
    assert address.scheme in ("http", "https")
    assert address.shown.isprintable()
    assert address.problem.isprintable()


def test_long_hosts_are_cut() -> None:
    """A line of output stays one, and keeps the port."""
    shown = parse_address("a\n" * 2000 + ":1234").shown
    assert len(shown) == 80
    assert shown.endswith(":1234")


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST.",
        "ollama.localhost",
        "127.0.0.1",
        "127.8.9.10",
        "::1",
        "[::1]",
        "0.0.0.0",
        "host.docker.internal",
        "host.containers.internal",
        socket.gethostname(),
    ],
)
def test_own(host: str) -> None:
    """Loopback, the own name, and the names by which containers call their machine."""
    assert is_own_address(host)


@pytest.mark.parametrize(
    "host",
    ["198.51.100.7", "203.0.113.7", "2001:db8::1", "gpu-box.example.com", "localhost.example"],
)
def test_foreign(host: str) -> None:
    """Other machines hold no VRAM here."""
    assert not is_own_address(host)


def test_own_by_where_it_leads() -> None:
    """A name that leads to this machine is this machine, whatever it is called."""
    with FaultyServer("redirect") as server:
        # The redirect's target answers anybody sensibly. The resolver knows this short form
        # of 127.0.0.1 as it knows the names of a hosts file; the table above does not.
        found = ask(parse_address(f"127.1:{server.redirect_port}"), 30)
    assert not is_own_address("127.1")
    assert (found.answered, found.on_this_host, found.problem) == (True, True, "")


def test_bad_port_is_told() -> None:
    """Where nobody answers, the odd port is part of the reason."""
    found = ask(parse_address("http://127.0.0.1:x"), 0.5)
    assert not found.answered
    assert found.problem.endswith("('x' is no port: 80 is used)")


@pytest.mark.parametrize("text", ["a b", "exa\x00mple", "\ud800", "[::1", "a" * 300, "%zz"])
def test_ask_never_raises(text: str) -> None:
    """An address that no URL can have is a reason, not an exception."""
    found = ask(parse_address(text), 0.5)
    assert not found.answered
    assert found.problem.isprintable()
    assert found.problem


def test_https() -> None:
    """https means https: a server that speaks something else there is a reason, too."""
    with FaultyServer("not-http") as server:
        found = ask(parse_address(f"https://{server.host}"), 5)
    assert not found.answered
    assert found.problem.startswith("cannot be reached: ")


@pytest.mark.parametrize("scheme", ["", "http://", "https://", "x://"])
@given(
    st.text("abc/:?#[]@ '\"", max_size=8).map(lambda text: f"s3cr3t{text}"),
    st.sampled_from(["gpu-box", "[::1]", "127.0.0.1:80", "h:port/x", ""]),
)
def test_a_password_is_never_shown(scheme: str, password: str, host: str) -> None:
    """Whatever is in it: not as host, port, path or problem, nor in what is called."""
    text = f"{scheme}user:{password}@{host}"
    found = parse_address(text)
    assert "s3cr3t" not in repr(found)
    assert "s3cr3t" not in found.shown + found.url + without_secrets(text)
