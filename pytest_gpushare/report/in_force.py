"""The settings in force, each as its user would write it, and where it came from."""

from __future__ import annotations

from pytest_gpushare.probe.address import without_secrets
from pytest_gpushare.settings.options import OPTIONS, Option
from pytest_gpushare.settings.values import Settings
from pytest_gpushare.settings.written_as import written_as


def in_force(settings: Settings) -> dict[str, dict[str, str]]:
    """Key -> `value` and `origin`."""
    return {
        option.key: {
            "value": in_words(option, getattr(settings, option.attribute)),
            "origin": settings.origins.get(option.key, "default"),
        }
        for option in OPTIONS
    }


def in_words(option: Option, value: object) -> str:
    """A value as its user would write it, without the secrets of a URL."""
    if option.key == "ollama_host":
        return without_secrets(str(value))
    return written_as(option, value)
