"""The JSON file: what is read, and what is refused with place, value and remedy."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest

from pytest_gpushare.config.options import JSON_FILE, JSON_SECTION
from pytest_gpushare.config.settings import Settings
from pytest_gpushare.config.sources import Written, load, read_section
from pytest_gpushare.errors import SettingsError
from pytest_gpushare.units import GB, MB

FOUNDING = {
    "ollama_vram_reservation_mb": 12288,
    "max_workers_per_gb": 0.25,
    "safety_buffer_mb": 1024,
    "enable_ollama_detection": True,
    "min_vram_per_worker_gb": 3.0,
    "fallback_to_cpu_when_constrained": True,
}
"""The founding write-up's file, as it stands there."""

VARIANTS = {
    "conservative": FOUNDING,
    "aggressive": {
        "ollama_vram_reservation_mb": 11264,
        "max_workers_per_gb": 0.33,
        "min_vram_per_worker_gb": 2.5,
    },
    "ultra-conservative": {
        "ollama_vram_reservation_mb": 14336,
        "max_workers_per_gb": 0.2,
        "min_vram_per_worker_gb": 4.0,
    },
}


def settings_of(content: str | bytes, directory: Path) -> Settings:
    """The settings with this content in the file that is found by itself."""
    data = content.encode() if isinstance(content, str) else content
    (directory / JSON_FILE).write_bytes(data)
    return load(Written({}, {}, {}, "pytest.ini", directory, directory, directory))


def section(body: str) -> str:
    """A whole file with this inside its section."""
    return f'{{"{JSON_SECTION}": {{{body}}}}}'


@pytest.mark.parametrize("name", VARIANTS)
def test_founding_files(name: str, tmp_path: Path) -> None:
    """The founding write-up's file and its variants, beside sections of other tools."""
    values = VARIANTS[name]
    found = settings_of(json.dumps({"other": [1, None], JSON_SECTION: values}), tmp_path)
    assert found.ollama_vram_reservation == int(str(values["ollama_vram_reservation_mb"])) * MB
    assert found.max_workers_per_gb == Fraction(str(values["max_workers_per_gb"]))
    assert found.min_vram_per_worker == Fraction(str(values["min_vram_per_worker_gb"])) * GB
    assert (found.safety_buffer, found.max_workers_per_gpu) == (GB, 2)
    assert found.origins["max_workers_per_gb"] == JSON_FILE


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode("utf-8"),
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.encode("utf-16"),
        lambda text: text.encode("utf-16-le"),
        lambda text: text.encode("utf-16-be"),
        lambda text: text.encode("utf-32"),
        lambda text: text.replace(" ", "\r\n").encode(),
    ],
)
def test_encodings(encode: Callable[[str], bytes], tmp_path: Path) -> None:
    """What Windows editors and shells write is read: byte order marks, UTF-16, line ends."""
    found = settings_of(encode(section('"safety_buffer_mb": 2048')), tmp_path)
    assert found.safety_buffer == 2 * GB


@pytest.mark.parametrize(
    ("body", "key", "expected"),
    [
        ('"safety_buffer_mb": 1.5', "safety_buffer", 3 * MB // 2),
        ('"safety_buffer_mb": "2GB"', "safety_buffer", 2 * GB),
        ('"safety_buffer_mb": 2e3', "safety_buffer", 2000 * MB),
        ('"safety_buffer_mb": 0', "safety_buffer", 0),
        ('"safety_buffer_mb": -0', "safety_buffer", 0),
        ('"max_workers_per_gb": 0.29', "max_workers_per_gb", Fraction(29, 100)),
        ('"max_workers_per_gb": 0.1000000000000000055', "max_workers_per_gb",
         Fraction("0.1000000000000000055")),
        ('"max_workers_per_gpu": 3.0', "max_workers_per_gpu", 3),
        ('"preset": ["no-ollama", "packed"]', "presets", ("no-ollama", "packed")),
        ('"ollama_gpu": 0', "ollama_gpu", ("0",)),
        ('"ollama_gpu": [0, "GPU-1234"]', "ollama_gpu", ("0", "GPU-1234")),
        ('"ollama_gpu": "none"', "ollama_gpu", ("none",)),
        ('"ollama_host": "gpu-box:80"', "ollama_host", "gpu-box:80"),
        ('"vram": {"test_a.py": "8GB"}', "vram", (("test_a.py", 8 * GB),)),
        ('"vram": ["test_a.py = 8GB"]', "vram", (("test_a.py", 8 * GB),)),
        ('"vram": "test_a.py = 8GB"', "vram", (("test_a.py", 8 * GB),)),
        ('"markers": {"serial": "exclusive"}', "markers",
         (("serial", (), (("exclusive", ""),), "serial = exclusive"),)),
    ],
)  # fmt: skip
def test_accepted(body: str, key: str, expected: object, tmp_path: Path) -> None:
    """Numbers, sizes as texts, lists of names, indices as numbers: exact in every case."""
    assert getattr(settings_of(section(body), tmp_path), key) == expected


BARE = "; write it without quotes"
SIZE = "allowed is a number of MB from 0 to 1073741824, or a size such as 512MB or 4.5GB"
ONES = "1" * 57 + "..."
REFUSED = {
    "": ": broken JSON at line 1, column 1: Expecting value",
    '{\n "a": 1,\n}': ": broken JSON at line ",
    "{'a': 1}": ": broken JSON at line 1, column 2: Expecting property name",
    section('"safety_buffer_mb": -1'): f": safety_buffer_mb = -1: {SIZE}",
    section('"safety_buffer_mb": -0.5'): f": safety_buffer_mb = -0.5: {SIZE}",
    section('"safety_buffer_mb": NaN'): f": safety_buffer_mb = NaN: {SIZE}",
    section('"safety_buffer_mb": Infinity'): f": safety_buffer_mb = Infinity: {SIZE}",
    section('"safety_buffer_mb": -Infinity'): f": safety_buffer_mb = -Infinity: {SIZE}",
    section('"safety_buffer_mb": true'): f": safety_buffer_mb = true: {SIZE}",
    section('"safety_buffer_mb": null'): f": safety_buffer_mb = null: {SIZE}",
    section('"safety_buffer_mb": "1.5"'): f": safety_buffer_mb = '1.5': {SIZE}{BARE}",
    section('"max_workers_per_gb": "0.25"'): (
        f": max_workers_per_gb = '0.25': allowed is a number from 0 to 1000{BARE}"
    ),
    section('"cpu_workers": "2"'): (
        f": cpu_workers = '2': allowed is auto, or a whole number from 0 to 1024{BARE}"
    ),
    section('"ollama_timeout_s": "1"'): (
        f": ollama_timeout_s = '1': allowed is a number from 0.01 to 60 seconds{BARE}"
    ),
    section('"cap_vram": "yes"'): f": cap_vram = 'yes': allowed is true or false{BARE}",
    section('"safety_buffer_mb": ""'): f": safety_buffer_mb = '': {SIZE}",
    section('"safety_buffer_mb": "much"'): f": safety_buffer_mb = 'much': {SIZE}",
    section('"safety_buffer_mb": "-1GB"'): f": safety_buffer_mb = '-1GB': {SIZE}",
    section('"safety_buffer_mb": "1\\u212aB"'): f": safety_buffer_mb = '1\u212aB': {SIZE}",
    section('"safety_buffer_mb": [1]'): f": safety_buffer_mb = [1]: {SIZE}",
    section('"safety_buffer_mb": {"a": {"b": 1}}'): f": safety_buffer_mb = {{...}}: {SIZE}",
    section('"safety_buffer_mb": 1073741825'): f": safety_buffer_mb = 1073741825: {SIZE}",
    section(f'"safety_buffer_mb": 1{"0" * 30}'): f": safety_buffer_mb = 1{'0' * 30}: {SIZE}",
    section(f'"safety_buffer_mb": {"1" * 5000}'): f": safety_buffer_mb = {ONES}: {SIZE}",
    section('"safety_buffer_mb": 1.' + "0" * 101): (
        f": safety_buffer_mb = 1.{'0' * 55}...: {SIZE}"
    ),
    section('"safety_buffer_mb": 1e999999999'): f": safety_buffer_mb = 1E+999999999: {SIZE}",
    section('"safety_buffer_mb": 1e-999999999'): f": safety_buffer_mb = 1E-999999999: {SIZE}",
    section('"safety_buffer_mb": 1e99999999999999999999'): (
        ": '1e99999999999999999999' is beyond all bounds: write a smaller number"
    ),
    section('"min_vram_per_worker_gb": 0'): (
        ": min_vram_per_worker_gb = 0: allowed is a number of GB from 0.001 to 1048576, "
        "or a size such as 512MB or 4.5GB"
    ),
    section('"max_workers_per_gpu": 1.5'): (
        ": max_workers_per_gpu = 1.5: allowed is a whole number from 0 to 1024"
    ),
    section('"max_workers_per_gb": "0.25GB"'): (
        ": max_workers_per_gb = '0.25GB': allowed is a number from 0 to 1000"
    ),
    section('"ollama_timeout_s": 0'): (
        ": ollama_timeout_s = 0: allowed is a number from 0.01 to 60 seconds"
    ),
    section('"enable_ollama_detection": 1'): (
        ": enable_ollama_detection = 1: allowed is true or false"
    ),
    section('"enable_ollama_detection": "maybe"'): (
        ": enable_ollama_detection = 'maybe': allowed is true or false"
    ),
    section('"preset": ["agressive"]'): (
        ": preset = ['agressive']: allowed is one or several of conservative, aggressive, "
        "ultra-conservative, no-ollama, packed"
    ),
    section('"preset": []'): ": preset = []: allowed is one or several of conservative, ",
    section('"preset": 3'): ": preset = 3: allowed is one or several of conservative, ",
    section('"preset": [true, [1], {}, null]'): (
        ": preset = [true, [...], {...}, null]: allowed is one or several of conservative, "
    ),
    section('"ollama_gpu": -1'): (
        ": ollama_gpu = -1: allowed is auto, none, or indices and UUIDs of devices"
    ),
    section('"ollama_gpu": ["auto", "0"]'): (
        ": ollama_gpu = ['auto', '0']: allowed is auto, none, or indices and UUIDs of devices"
    ),
    section('"ollama_host": 11434'): ": ollama_host = 11434: allowed is a text",
    section('"ollama_host": "a\\u0000b"'): ": ollama_host = 'a\\x00b': allowed is a text",
    section('"max_workers_per_bg": 1'): (
        f", section {JSON_SECTION}: unknown key 'max_workers_per_bg': "
        "the nearest known one is max_workers_per_gb"
    ),
    section('"config": "other.json"'): f", section {JSON_SECTION}: unknown key 'config': ",
    section('"a\\nb": 1'): f", section {JSON_SECTION}: unknown key 'a\\nb': the nearest ",
    section('"gpu_share_preset": "packed"'): "the nearest known one is preset",
    section('"preset": "packed", "preset": "packed"'): (
        ": the key 'preset' occurs twice: keep one"
    ),
    section('"x\\ny": 1, "x\\ny": 1'): ": the key 'x\\ny' occurs twice: keep one",
    f'{{"{JSON_SECTION}": {{}}, "{JSON_SECTION}": {{}}}}': (
        f": the key '{JSON_SECTION}' occurs twice: keep one"
    ),
    f'{{"{JSON_SECTION}": []}}': f": {JSON_SECTION} is a list: allowed is an object of settings",
    f'{{"{JSON_SECTION}": null}}': f": {JSON_SECTION} is null: allowed is an object of settings",
    f'{{"{JSON_SECTION}": 3}}': f": {JSON_SECTION} is a number: allowed is an object of settings",
    f'{{"{JSON_SECTION}": NaN}}': f": {JSON_SECTION} is a number: allowed is an object of settings",
    f'{{"{JSON_SECTION}": "x"}}': f": {JSON_SECTION} is a text: allowed is an object of settings",
    f'{{"{JSON_SECTION}": true}}': f": {JSON_SECTION} is true or false: allowed is an object",
    "[]": ": is a list: allowed is an object with a section ",
    "null": ": is null: allowed is an object with a section ",
    "3": ": is a number: allowed is an object with a section ",
    "[" * 100_000: ": is nested too deeply: settings are one flat section",
    section(f'"preset": {"[" * 800}{"]" * 800}'): ": preset = [[...]]: allowed is one or ",
}


@pytest.mark.parametrize("content", REFUSED, ids=lambda content: content[:60])
def test_refused(content: str, tmp_path: Path) -> None:
    """File, key, value and what is allowed, on one line of bearable length."""
    with pytest.raises(SettingsError) as caught:
        settings_of(content, tmp_path)
    message = str(caught.value)
    assert message.startswith(JSON_FILE)
    assert REFUSED[content] in message
    assert len(message) < 400
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b'{"a": "\xe4"}', b"\x80", b"\xfe\xff\xd8\x00\xd8\x00"]
)
def test_no_text(content: bytes, tmp_path: Path) -> None:
    """Bytes that no encoding of JSON has are told with their position."""
    with pytest.raises(SettingsError, match=rf"^{JSON_FILE}: (is not UTF-8 text|broken JSON)"):
        settings_of(content, tmp_path)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ("{}", "add it, or name another file"),
        ('{"gpu_resource_managment": {}}', "the nearest to it is 'gpu_resource_managment'"),
        ('{"safety_buffer_mb": 1}', f"stand at the top level: put them under {JSON_SECTION}"),
    ],
)
def test_section_is_missing(content: str, hint: str, tmp_path: Path) -> None:
    """A file that was named must have the section; one that was found need not."""
    path = tmp_path / JSON_FILE
    path.write_text(content, encoding="utf-8")
    assert read_section(path, "own.json", required=False) is None
    with pytest.raises(SettingsError) as caught:
        read_section(path, "own.json", required=True)
    assert str(caught.value).startswith(f'own.json: no section "{JSON_SECTION}": ')
    assert hint in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    """A file that was named must be there; the one that would be found need not."""
    assert read_section(tmp_path / "x.json", "x.json", required=False) is None
    with pytest.raises(
        SettingsError, match=r"^x.json: no such file: check --gpu-share-config or gpu_share_config$"
    ):
        read_section(tmp_path / "x.json", "x.json", required=True)


def test_no_regular_file(tmp_path: Path) -> None:
    """A directory or a named pipe is refused without being opened, whether or not it was named."""
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    began = time.monotonic()
    for name, kind in (("directory", "a directory"), ("pipe", "not a regular file")):
        with pytest.raises(SettingsError, match=rf"^{name}: is {kind}: name a JSON file$"):
            read_section(tmp_path / name, name, required=True)
        with pytest.raises(SettingsError, match=rf"^{name}: is {kind}: rename it, or name "):
            read_section(tmp_path / name, name, required=False)
    assert time.monotonic() - began < 1


def test_unusable_paths(tmp_path: Path) -> None:
    """Paths that lead through a file, round in a circle or nowhere are told with the reason."""
    (tmp_path / "file").write_text("{}", encoding="utf-8")
    (tmp_path / "circle").symlink_to("circle")
    names = {
        "file/x.json": "Not a directory",
        "circle": "Too many levels of symbolic links",
        "x" * 300: "File name too long",
        "a\0b": ".*embedded null .*",
    }
    for name, why in names.items():
        with pytest.raises(SettingsError, match=rf"^shown: cannot be read: {why}; check the path"):
            read_section(tmp_path / name, "shown", required=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file(tmp_path: Path) -> None:
    """A file without permission to read is told as such."""
    path = tmp_path / "x.json"
    path.write_text("{}", encoding="utf-8")
    path.chmod(0)
    with pytest.raises(SettingsError, match=r"^x.json: cannot be read: Permission denied"):
        read_section(path, "x.json", required=True)


def test_huge_file(tmp_path: Path) -> None:
    """100 MB are refused by their size, unread."""
    path = tmp_path / JSON_FILE
    with path.open("wb") as file:
        file.truncate(100 * MB)
    began = time.monotonic()
    with pytest.raises(SettingsError) as caught:
        read_section(path, JSON_FILE, required=False)
    assert time.monotonic() - began < 0.5
    assert str(caught.value) == (
        f"{JSON_FILE}: has 100.0 MB: a settings file may have 1 MB; "
        "name another file with --gpu-share-config"
    )


def test_largest_file(tmp_path: Path) -> None:
    """Up to the limit all is read, however odd, in bearable time."""
    many = ", ".join(f'"k{number}": {"9" * 50}' for number in range(15_000))
    began = time.monotonic()
    assert settings_of(f'{{{many}, "{JSON_SECTION}": {{}}}}', tmp_path).safety_buffer == GB
    with pytest.raises(SettingsError, match="safety_buffer_mb = 111"):
        settings_of(section(f'"safety_buffer_mb": {"1" * 1_000_000}'), tmp_path)
    assert time.monotonic() - began < 5
