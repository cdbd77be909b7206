"""What is run first on another host, sent there as a text: only the standard library is used.

It reports what would make workers fail there, and goes on with the plugin where it fits.
"""

from __future__ import annotations

from typing import Any


def main() -> None:
    """Report, and go on."""
    import json
    import os
    import sys

    # Whatever prints to standard output there must not be taken for the agent's messages.
    stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        stream.write(b"gpu-share:" + json.dumps(message).encode("ascii") + b"\n")
        stream.flush()

    request = json.loads(sys.stdin.readline())
    sys.path[:] = [entry for entry in sys.path if entry]

    def version(name: str) -> str | None:
        from importlib import metadata

        try:
            return metadata.version(name)
        except Exception:
            return None

    versions = {name: version(name) for name in request["versions"]}
    directory = os.getcwd()  # noqa: PTH109 - the standard library alone
    hello = [sys.version.split()[0], sys.executable, directory, sys.path, versions]
    send({"kind": "hello", "value": hello})
    if versions != request["versions"]:
        return
    # In a checkout the package may lie in the directory itself.
    from pytest_gpushare.hosts.agent import serve

    serve(request, send, sys.stdin)


main()
