"""Values as a user would write them: what is shown can be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_gpushare.config.kinds import kind_of, read
from pytest_gpushare.config.options import BY_KEY, OPTIONS
from pytest_gpushare.config.sources import Written, load

HERE = Path("/nowhere")


@pytest.mark.parametrize(
    ("key", "written", "shown"),
    [
        ("safety_buffer_mb", "1GB", "1024"),
        ("min_vram_per_worker_gb", "512MB", "0.5"),
        ("max_workers_per_gb", "0.33", "0.33"),
        ("ollama_vram_reservation_mb", "auto", "auto"),
        ("cap_vram", "no", "false"),
        ("preset", "packed no-ollama", "packed, no-ollama"),
        ("vram", "test_a.py = 6GB\ntest_b.py = 512MB", "test_a.py = 6.0GB, test_b.py = 0.5GB"),
        ("markers", "multi = devices=2", "multi = devices=2"),
    ],
)
def test_written_as(key: str, written: str, shown: str) -> None:
    option = BY_KEY[key]
    assert kind_of(option).write(read(option, written, "here")) == shown


def test_defaults_can_be_written_again() -> None:
    """What is shown of a default is read as the same value."""
    settings = load(Written({}, {}, {}, "", HERE, HERE, HERE))
    for option in OPTIONS:
        value = getattr(settings, option.attribute)
        shown = kind_of(option).write(value)
        if shown:
            assert read(option, shown, "here") == value, option.key
