"""A simulated Ollama, and servers that only pretend to be one."""

from .faulty import FAULTS, FaultyServer
from .models import Model
from .server import OllamaError, OllamaServer
from .settings import Settings

__all__ = ["FAULTS", "FaultyServer", "Model", "OllamaError", "OllamaServer", "Settings"]
