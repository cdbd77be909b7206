"""Whatever is written where a setting belongs: settings come out, or one readable line."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from pytest_gpushare.config.options import INI_PREFIX, JSON_FILE, JSON_SECTION, OPTIONS
from pytest_gpushare.config.settings import Settings
from pytest_gpushare.config.sources import Written, load, read_section
from pytest_gpushare.errors import SettingsError

KEYS = [option.key for option in OPTIONS]
NUMBERS = st.integers() | st.floats() | st.integers(-(10**40), 10**40)
SCALARS = st.none() | st.booleans() | NUMBERS | st.text()
SIZES = st.builds("{}{}".format, st.decimals(allow_nan=True), st.sampled_from(["", "GB", " MiB"]))
VALUES = st.recursive(
    SCALARS | SIZES,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
NOWHERE = Path(tempfile.gettempdir()) / "no such directory"


def readable(error: SettingsError) -> bool:
    """One line, not too long, and nothing that a terminal would obey."""
    message = str(error)
    return len(message) < 400 and message.isprintable() and bool(message)


def settled(written: Written) -> Settings | SettingsError:
    """The settings, or why they were refused; no other exception."""
    try:
        return load(written)
    except SettingsError as error:
        return error


def sensible(found: Settings | SettingsError) -> bool:
    """What the plan relies on; of a refusal what its reader does."""
    if isinstance(found, SettingsError):
        return readable(found)
    sizes = (found.ollama_vram_reservation, found.safety_buffer, found.ram_per_worker)
    return (
        all(0 <= size <= 2**50 for size in sizes)
        and 0 < found.min_vram_per_worker <= 2**50
        and 0 <= found.max_workers_per_gb <= 1000
        and 0 <= found.max_workers_per_gpu <= 1024
        and 0.01 <= found.ollama_timeout <= 60
        and len(found.presets) > 0
        and len(found.ollama_gpu) > 0
    )


@given(st.dictionaries(st.sampled_from(KEYS) | st.text(), VALUES, max_size=3))
@settings(max_examples=150)
@example({"safety_buffer_mb": "1\u212aB"})
@example({"ollama_host": "\ud800"})
@example({"preset": ["x" * 5000]})
@example({"x" * 5000: 1})
def test_any_json_value(section: dict[str, Any]) -> None:
    """Any value for any key of the JSON file."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / JSON_FILE).write_text(json.dumps({JSON_SECTION: section}), encoding="utf-8")
        found = settled(Written({}, {}, {}, "pytest.ini", root, root, root))
    assert sensible(found), found


@given(st.binary(max_size=200) | st.text().map(lambda text: text.encode("utf-8", "replace")))
@settings(max_examples=150)
@example(b'{"gpu_resource_management": {"safety_buffer_mb": 1e99999999999999999999}}')
@example(b'{"gpu_resource_management": {"a": 1, "a": 1}, "b": NaN}')
def test_any_bytes(content: bytes) -> None:
    """Any file: nothing of ours in it, or a readable reason."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / JSON_FILE
        path.write_bytes(content)
        try:
            found = read_section(path, JSON_FILE, required=False)
        except SettingsError as error:
            found = {"refused readably": readable(error)}
    assert found in (None, {"refused readably": True})


TYPED = VALUES | st.dates() | st.times() | st.just(10**5000)


@given(
    st.dictionaries(st.sampled_from(KEYS).map(INI_PREFIX.__add__), TYPED, max_size=2),
    st.dictionaries((st.sampled_from(KEYS) | st.text()).map(INI_PREFIX.__add__), st.text()),
    st.dictionaries(st.sampled_from(["preset", "config"]), st.text() | st.lists(st.text())),
)
@settings(max_examples=150)
@example({"gpu_share_safety_buffer_mb": 10**5000}, {}, {})
@example({}, {}, {"config": "~no such user/x"})
@example({}, {}, {"config": "line\nbreak\u2028.json"})
def test_any_written_value(
    ini: dict[str, Any], overrides: dict[str, Any], flags: dict[str, Any]
) -> None:
    """Typed values of TOML, texts of ini files and of the command line."""
    found = settled(Written(flags, overrides, ini, "pytest.ini", NOWHERE, NOWHERE, NOWHERE))
    assert sensible(found), found
