"""A small application that uses Ollama."""

from __future__ import annotations

import json
import urllib.request
from typing import Any


def ask(base_url: str, model: str, question: str, options: dict[str, Any]) -> dict[str, Any]:
    """The server's answer to a question."""
    body = {"model": model, "prompt": question, "stream": False, "options": options}
    request = urllib.request.Request(
        f"{base_url}/api/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def shortened(text: str, length: int) -> str:
    """A text of at most so many characters."""
    return text if len(text) <= length else f"{text[: length - 1]}…"
