"""Precedence: command line > ini > JSON > default, and presets at the level that names them."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_gpushare.config import kinds
from pytest_gpushare.config.kinds import defaults, kind_of, read
from pytest_gpushare.config.options import BY_KEY, JSON_SECTION, OPTIONS, PRESETS
from pytest_gpushare.config.settings import Settings
from pytest_gpushare.config.sources import Written, load
from pytest_gpushare.errors import SettingsError
from pytest_gpushare.units import GB, MB

NOWHERE = Path(tempfile.gettempdir()) / "no such directory"
SCALE = "max_workers_per_gb"


def written(
    root: Path = NOWHERE,
    *,
    flags: Mapping[str, object] | None = None,
    overrides: Mapping[str, object] | None = None,
    ini: Mapping[str, object] | None = None,
    section: Mapping[str, object] | None = None,
) -> Written:
    """What a user wrote in each place, keys without their prefix; a section becomes a file."""
    if section is not None:
        typed = {key: as_json(value) for key, value in section.items()}
        text = json.dumps({JSON_SECTION: typed})
        (root / "performance_config.json").write_text(text, encoding="utf-8")
    return Written(
        flags=flags or {},
        overrides={f"gpu_share_{key}": value for key, value in (overrides or {}).items()},
        ini={f"gpu_share_{key}": value for key, value in (ini or {}).items()},
        ini_file="pytest.ini",
        root=root,
        ini_directory=root,
        invocation_directory=root,
    )


def as_json(value: object) -> object:
    """A number as JSON writes it, without quotes."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[0-9.]+", value) else value


def test_defaults() -> None:
    """Nothing written: the table's defaults, in bytes and seconds, which are `conservative`."""
    found = load(written())
    expected = {
        "ollama_vram_reservation": 12 * GB,
        "safety_buffer": GB,
        "max_workers_per_gb": Fraction(1, 4),
        "min_vram_per_worker": 3 * GB,
        "max_workers_per_gpu": 2,
        "ram_per_worker": 0,
        "presets": ("conservative",),
        "enable_ollama_detection": True,
        "fallback_to_cpu_when_constrained": True,
        "ollama_host": "",
        "ollama_gpu": ("auto",),
        "ollama_timeout": Fraction(1, 2),
        "config": "",
    }
    assert {name: getattr(found, name) for name in expected} == expected
    assert [getattr(found, option.attribute) for option in OPTIONS] == [
        read(option, option.default, "") for option in OPTIONS
    ]
    assert found.origins == {option.key: "default" for option in OPTIONS}


def test_conservative_is_the_default() -> None:
    """The preset and the defaults cannot drift apart."""
    for key, value in PRESETS["conservative"].items():
        assert read(BY_KEY[key], value, "preset") == defaults([BY_KEY[key]])[key]


LEVELS = ("json", "ini", "override")
RANKS = {"default": 0, "json": 1, "ini": 2, "override": 3, "flag": 3}
ORIGINS = {
    "json": "performance_config.json",
    "ini": "pytest.ini",
    "override": "command line, -o",
    "flag": "command line, --gpu-share-preset",
}


def at_levels(root: Path, places: Mapping[str, Mapping[str, object]]) -> Settings:
    """The settings with these values at these levels."""
    return load(
        written(
            root,
            flags=places.get("flag"),
            overrides=places.get("override"),
            ini=places.get("ini"),
            section=places.get("json"),
        )
    )


@pytest.mark.parametrize("present", [set(), {"json"}, {"ini"}, {"override"}, {"json", "ini"},
    {"json", "override"}, {"ini", "override"}, set(LEVELS)])  # fmt: skip
def test_highest_level_wins(present: set[str], tmp_path: Path) -> None:
    """The same key at several levels: the highest counts, and the origin says so."""
    values = {"json": 0.5, "ini": "0.6", "override": "0.7"}
    found = at_levels(tmp_path, {level: {SCALE: values[level]} for level in present})
    highest = next((level for level in reversed(LEVELS) if level in present), None)
    assert found.max_workers_per_gb == Fraction(str(values[highest] if highest else "0.25"))
    assert found.origins[SCALE] == (ORIGINS[highest] if highest else "default")


@pytest.mark.parametrize("named_at", ["json", "ini", "override", "flag"])
@pytest.mark.parametrize("explicit_at", [None, "json", "ini", "override"])
def test_preset_ranks_where_it_is_named(
    named_at: str, explicit_at: str | None, tmp_path: Path
) -> None:
    """Explicit keys at the preset's level or above beat it; those below do not."""
    places: dict[str, dict[str, object]] = {named_at: {"preset": ["aggressive"]}}
    if explicit_at:
        places.setdefault(explicit_at, {})[SCALE] = "0.5"
    found = at_levels(tmp_path, places)
    beaten = explicit_at is None or RANKS[explicit_at] < RANKS[named_at]
    assert found.max_workers_per_gb == Fraction("0.33" if beaten else "0.5")
    assert found.origins[SCALE] == ("preset aggressive" if beaten else ORIGINS[str(explicit_at)])
    # What the preset sets beside it stands in any case.
    assert found.min_vram_per_worker == Fraction("2.5") * GB
    assert found.presets == ("aggressive",)


def test_named_conservative_beats_lower_levels(tmp_path: Path) -> None:
    """The default's name, written down, is a preset as any other."""
    found = at_levels(tmp_path, {"json": {SCALE: 0.5}, "flag": {"preset": ["conservative"]}})
    assert found.max_workers_per_gb == Fraction(1, 4)


def test_later_presets_win() -> None:
    """Of several presets the later one decides, and the earlier fills in."""
    found = load(written(ini={"preset": "no-ollama, packed"}))
    assert (found.ollama_vram_reservation, found.min_vram_per_worker) == (0, GB)
    assert found.enable_ollama_detection is False
    both = load(written(ini={"preset": "aggressive ultra-conservative"}))
    assert both.max_workers_per_gb == Fraction("0.2")


def test_flags_beat_overrides() -> None:
    """`--gpu-share-preset` beats `-o gpu_share_preset=`, in whatever order they stand."""
    found = load(written(flags={"preset": ["packed"]}, overrides={"preset": "aggressive"}))
    assert found.presets == ("packed",)


def test_several_flags() -> None:
    """The repeated flag and the comma mean the same."""
    for flags in (["no-ollama", "packed"], ["no-ollama,packed"]):
        assert load(written(flags={"preset": flags})).presets == ("no-ollama", "packed")


OVERLAPPING = st.fixed_dictionaries(
    {},
    optional={
        level: st.fixed_dictionaries(
            {},
            optional={
                SCALE: st.sampled_from(["0.1", "0.5", "1"]),
                "min_vram_per_worker_gb": st.sampled_from(["1", "5GB"]),
                "max_workers_per_gpu": st.sampled_from(["0", "7"]),
                "safety_buffer_mb": st.sampled_from(["0", "2GB"]),
                "preset": st.sampled_from([[name] for name in PRESETS]),
            },
        )
        for level in LEVELS
    },
)


@given(OVERLAPPING)
@settings(max_examples=150)
def test_precedence_as_told(places: dict[str, dict[str, Any]]) -> None:
    """Any mixture: each key has the value that the rule, written down plainly, gives it."""
    with tempfile.TemporaryDirectory() as directory:
        found = at_levels(Path(directory), places)
    order = ["override", "ini", "json"]
    preset_at = next((level for level in order if "preset" in places.get(level, {})), "default")
    preset = places[preset_at]["preset"][0] if preset_at != "default" else "conservative"
    for key in (SCALE, "min_vram_per_worker_gb", "max_workers_per_gpu", "safety_buffer_mb"):
        raw, origin = BY_KEY[key].default, "default"
        for level in reversed(order):
            if level == preset_at and key in PRESETS[preset]:
                raw, origin = PRESETS[preset][key], f"preset {preset}"
            if key in places.get(level, {}):
                raw, origin = places[level][key], ORIGINS[level]
        assert getattr(found, BY_KEY[key].attribute) == read(BY_KEY[key], raw, "")
        assert found.origins[key] == origin


def test_same_value_at_every_level(tmp_path: Path) -> None:
    """Each option that a JSON file may have means the same in JSON, ini file and after -o."""
    samples: dict[type[kinds.Kind], tuple[str, object]] = {
        kinds.Size: ("1.5GB", "1.5GB"),
        kinds.Number: ("0.75", 0.75),
        kinds.Integer: ("3", 3),
        kinds.Text: ("gpu-box:80", "gpu-box:80"),
        kinds.Devices: ("0", 0),
        kinds.Names: ("a-model:7b", "a-model:7b"),
        kinds.Name: ("cuda", "cuda"),
    }
    lines: dict[str, tuple[str, object]] = {
        "markers": ("serial = exclusive", ["serial = exclusive"]),
        "ollama_tests": ("test_a.py = a:7b", {"test_a.py": "a:7b"}),
        "vram": ("test_a.py = 8GB", {"test_a.py": "8GB"}),
    }
    for option in OPTIONS:
        if not option.in_json:
            continue
        if isinstance(kind_of(option), kinds.Boolean):
            raw: tuple[str, object] = ("false", False) if option.default == "true" else ("1", True)
        elif kind_of(option).choices:
            raw = kind_of(option).choices[-1], kind_of(option).choices[-1]
        else:
            raw = lines[option.key] if option.key in lines else samples[type(kind_of(option))]
            if raw[0] == option.default:
                raw = option.accepts["high"], int(option.accepts["high"])
        levels = [
            at_levels(tmp_path, {"json": {}, level: {option.key: raw[level == "json"]}})
            for level in LEVELS
        ]
        values = [getattr(found, option.attribute) for found in levels]
        assert values == [read(option, raw[0], "")] * 3
        assert values[0] != read(option, option.default, "")


def test_named_file_is_relative_to_where_it_is_named(tmp_path: Path) -> None:
    """A path in the ini file counts from there, one on the command line from where one stands."""
    for name, scale in (("project", 0.5), ("here", 0.6)):
        (tmp_path / name).mkdir()
        content = {JSON_SECTION: {SCALE: scale}}
        (tmp_path / name / "own.json").write_text(json.dumps(content), encoding="utf-8")
    places = {
        "ini_file": "pytest.ini",
        "root": tmp_path,
        "ini_directory": tmp_path / "project",
        "invocation_directory": tmp_path / "here",
    }
    name = "gpu_share_config"
    by_ini = load(Written({}, {}, {name: "own.json"}, **places))  # type: ignore[arg-type]
    by_override = load(Written({}, {name: "own.json"}, {}, **places))  # type: ignore[arg-type]
    by_flag = load(Written({"config": "own.json"}, {}, {}, **places))  # type: ignore[arg-type]
    found = [by_ini, by_override, by_flag]
    assert [float(each.max_workers_per_gb) for each in found] == [0.5, 0.6, 0.6]
    assert {each.config for each in found} == {"own.json"}


def test_empty_config_means_no_file(tmp_path: Path) -> None:
    """`-o gpu_share_config=` leaves aside even the file that is found by itself."""
    found = load(written(tmp_path, overrides={"config": ""}, section={SCALE: 0.5}))
    assert found.max_workers_per_gb == Fraction(1, 4)


def test_unknown_home(tmp_path: Path) -> None:
    """A home directory that nobody has is an error with the path, not a crash."""
    with pytest.raises(SettingsError, match=r"^~no_such_user_/x.json: no such home directory"):
        load(written(tmp_path, flags={"config": "~no_such_user_/x.json"}))


def test_unknown_ini_key() -> None:
    """A misspelt key is told with its file and the nearest that exists."""
    with pytest.raises(SettingsError) as caught:
        load(written(ini={"saftey_buffer_mb": "1"}))
    assert str(caught.value) == (
        "pytest.ini: unknown key 'gpu_share_saftey_buffer_mb': "
        "the nearest known one is gpu_share_safety_buffer_mb"
    )


def test_sizes_in_their_units() -> None:
    """A number counts in the unit of its key, a size in its own."""
    found = load(
        written(ini={"safety_buffer_mb": "2GB", "min_vram_per_worker_gb": "512MB",
                     "ram_per_worker_gb": "4.5 GiB", "ollama_vram_reservation_mb": "10240"})
    )  # fmt: skip
    assert (found.safety_buffer, found.min_vram_per_worker) == (2 * GB, 512 * MB)
    assert (found.ram_per_worker, found.ollama_vram_reservation) == (Fraction("4.5") * GB, 10 * GB)
