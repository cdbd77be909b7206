"""The same over https, through httpx, which is imported here and only for such a server."""

from __future__ import annotations

import httpx

from pytest_gpushare.ollama.address import Address
from pytest_gpushare.ollama.exchange import (
    HEADERS,
    JSON,
    Answer,
    Connection,
    NonsenseError,
    UnreachableError,
    check,
    left,
)
from pytest_gpushare.units import MB


class SecureConnection(Connection):
    """Over https: certificates are verified; no proxy, no .netrc, no redirects."""

    def __init__(self, address: Address) -> None:
        self._client = httpx.Client(
            base_url=address.url, trust_env=False, follow_redirects=False, headers=HEADERS
        )

    def _ask(
        self, method: str, path: str, body: bytes | None, deadline: float, most_bytes: int
    ) -> Answer:
        try:
            return self._exchange(method, path, body, deadline, most_bytes)
        except httpx.TimeoutException:
            raise TimeoutError from None
        except httpx.ConnectError as error:
            refused = "refused" in str(error).lower() or "10061" in str(error)
            raise UnreachableError("" if refused else str(error)) from None
        except httpx.HTTPError as error:
            raise NonsenseError(f"{type(error).__name__}: {error}") from None

    def close(self) -> None:
        """See `exchange.Connection.close`."""
        self._client.close()

    def _exchange(
        self, method: str, path: str, sent: bytes | None, deadline: float, most_bytes: int
    ) -> Answer:
        with self._client.stream(
            method, path, content=sent, headers=JSON if sent else None, timeout=left(deadline)
        ) as response:
            check(path, response.status_code, response.headers.get("content-encoding"))
            stream = response.extensions.get("network_stream")
            peer = stream.get_extra_info("server_addr") if stream is not None else None
            body = bytearray()
            for chunk in response.iter_raw():
                body += chunk
                if len(body) > most_bytes:
                    raise NonsenseError(f"{path} gives more than {most_bytes // MB} MB")
                left(deadline)
        return Answer(bytes(body), peer[0] if isinstance(peer, tuple) else None)
