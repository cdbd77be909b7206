"""``python -m simulator.ollama``: a simulated Ollama as a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from ..machine import STATE_VARIABLE, Machine
from .server import OllamaServer
from .settings import Settings


def main() -> int:
    """Serve until interrupted or terminated; the first line printed is the base URL."""
    parser = argparse.ArgumentParser(prog="python -m simulator.ollama", description=main.__doc__)
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    parser.add_argument(
        "--models",
        default="{}",
        help="JSON, or a file of it: names to sizes ('10.8GB') or to fields of Model",
    )
    parser.add_argument("--version", default="0.33.0", help="what /api/version answers")
    parser.add_argument("--load", action="append", default=[], help="model to load at the start")
    defaults = Settings()
    for name in Settings.__dataclass_fields__:
        default = getattr(defaults, name)
        kind = type(default) if isinstance(default, float) else str
        if name in ("context_length", "parallel", "max_loaded", "max_queue"):
            kind = int
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default)
    options = parser.parse_args()
    settings = Settings(**{name: getattr(options, name) for name in Settings.__dataclass_fields__})
    machine = Machine.open() if os.environ.get(STATE_VARIABLE) else None
    models = _models(options.models)
    # Terminated like interrupted: the runners then end, and their VRAM is free, before we do.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = OllamaServer(
        machine, models, port=options.port, version=options.version, settings=settings
    )
    try:
        for name in options.load:
            server.load(name)
        print(server.url, flush=True)
        while not server.wait(60):
            pass
    except KeyboardInterrupt:
        pass
    finally:
        server.close()
    return 0


def _models(text: str) -> dict[str, Any]:
    if not text.lstrip().startswith("{"):
        text = Path(text).read_text(encoding="utf-8")
    models: dict[str, Any] = json.loads(text)
    return models


if __name__ == "__main__":
    sys.exit(main())
