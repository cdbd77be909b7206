"""The errors that a user may see, each with the fact, the limit and the remedy.

They know nothing of pytest: `pytest_gpushare.plugin` turns them into `pytest.UsageError`, which
pytest prints without a traceback (exit code 4).
"""

from __future__ import annotations


class GpuShareError(Exception):
    """A condition under which the run cannot start as asked; its text is for the user."""


class SettingsError(GpuShareError):
    """A setting that cannot be used: names the place, what was found and what is allowed."""


class OllamaUnreachableError(GpuShareError):
    """Ollama gives no answer and `ollama_unreachable` is `fail`."""


class NoRoomError(GpuShareError):
    """No GPU worker fits and `fallback_to_cpu_when_constrained` is false."""


class PreloadError(GpuShareError):
    """A model of Ollama's could not be loaded, and `ollama_preload_failed` is fail."""


class LineError(ValueError):
    """A line of a setting that cannot be used; becomes a `SettingsError`."""

    def __init__(self, line: str, problem: str) -> None:
        super().__init__(line, problem)
        self.line = line
        self.problem = problem
