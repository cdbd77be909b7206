"""Settings of several lines: meanings of markers, and needs by node id."""

from __future__ import annotations

import pytest

from pytest_gpushare.config.kinds import read
from pytest_gpushare.config.options import BY_KEY
from pytest_gpushare.config.settings import parse_aliases, parse_model_rules, parse_rules
from pytest_gpushare.errors import LineError, SettingsError
from pytest_gpushare.units import GB, MB

MEANINGS = (
    "allowed are lines MARKER = meaning or MARKER(n) = meaning; "
    "meanings: vram=SIZE, devices=NUMBER, exclusive, required, gpu, cpu, ollama, ollama=MODEL, "
    "context=TOKENS"
)
SIZES = "allowed are lines PATTERN = SIZE, such as tests/test_llm.py = 8GB"


def test_the_lines_of_the_documentation() -> None:
    """Meanings with and without parameters, several of them, comments and empty lines."""
    text = """
    # what the suite has
    multi_gpu = devices=2
    profiled_vram_gib(n) = vram={n}GB
    serial = exclusive
    not_device_test = cpu

    large(gib, count) = vram={gib}GB, devices={count} required
    """
    assert [alias[:3] for alias in parse_aliases(text)] == [
        ("multi_gpu", (), (("devices", "2"),)),
        ("profiled_vram_gib", ("n",), (("vram", "{n}GB"),)),
        ("serial", (), (("exclusive", ""),)),
        ("not_device_test", (), (("cpu", ""),)),
        ("large", ("gib", "count"), (("vram", "{gib}GB"), ("devices", "{count}"),
                                     ("required", ""))),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("serial", "is not MARKER = meaning"),
        ("2d = exclusive", "is not MARKER = meaning"),
        ("a(n = vram={n}GB", "is not MARKER = meaning"),
        ("serial =", "nothing is not a meaning"),
        ("serial = alone", "alone is not a meaning"),
        ("serial = exclusive=yes", "exclusive=yes is not a meaning"),
        ("big = vram", "vram is not a meaning"),
        ("big = vram=12", "vram=12 cannot be read"),
        ("big = vram=muchGB", "vram=muchGB cannot be read"),
        ("big = vram=0GB", "vram=0GB cannot be read"),
        ("two = devices=0", "devices=0 cannot be read"),
        ("two = devices=65", "devices=65 cannot be read"),
        ("ctx = ollama=m context=0", "context=0 cannot be read"),
        ("ctx = ollama=m context=many", "context=many cannot be read"),
        ("big(n) = vram={m}GB", "{m} is not a parameter of the marker"),
        ("big(n, n) = vram={n}GB", "names a parameter twice"),
        ("big = vram=1GB vram=2GB", "names a meaning twice"),
        ("odd = cpu, devices=2", "means a CPU test and a need of the GPU"),
    ],
)
def test_a_wrong_meaning(line: str, problem: str) -> None:
    """The message names file, key and line, and says what is allowed."""
    raw = f"serial2 = exclusive\n{line}\n"
    with pytest.raises(SettingsError) as caught:
        read(BY_KEY["markers"], raw, "pytest.ini", written="gpu_share_markers")
    assert str(caught.value) == (
        f"pytest.ini: gpu_share_markers, line '{line.strip()}': {problem}: {MEANINGS}"
    )


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("tests/test_llm.py", "is not PATTERN = SIZE"),
        ("= 8GB", "is not PATTERN = SIZE"),
        ("tests/test_llm.py = 8", "8 is not a size with a unit"),
        ("tests/test_llm.py =", "nothing is not a size with a unit"),
        ("tests/test_llm.py = big", "big is not a size with a unit"),
        ("tests/test_llm.py = 0MB", "0MB is not a size with a unit"),
    ],
)
def test_a_wrong_rule(line: str, problem: str) -> None:
    """The same for needs by node id."""
    with pytest.raises(SettingsError) as caught:
        read(BY_KEY["vram"], ["a.py = 1GB", line], "pyproject.toml", written="gpu_share_vram")
    assert str(caught.value) == f"pyproject.toml: gpu_share_vram, line '{line}': {problem}: {SIZES}"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("tests/rag", "is not PATTERN = MODEL"),
        ("= qwen2.5:14b", "is not PATTERN = MODEL"),
        ("tests/rag =", "nothing is not the name of a model"),
        ("tests/rag = two words", "two words is not the name of a model"),
        (f"tests/rag = {'x' * 257}", f"{'x' * 257} is not the name of a model"),
    ],
)
def test_a_wrong_model(line: str, problem: str) -> None:
    """The same for models by node id."""
    with pytest.raises(LineError) as caught:
        parse_model_rules(["a.py = llama3", line])
    assert caught.value.problem == problem


def test_no_lines_at_all() -> None:
    """What is no text, list or object of texts is refused as any wrong value."""
    for raw in (3, [3], True, None):
        with pytest.raises(SettingsError, match=r"^pytest.ini: vram = .*: allowed are lines"):
            read(BY_KEY["vram"], raw, "pytest.ini")
    with pytest.raises(SettingsError, match="more than 1000 lines"):
        read(BY_KEY["vram"], "a = 1GB\n" * 1001, "pytest.ini")
    with pytest.raises(SettingsError, match="more than 500 characters"):
        read(BY_KEY["vram"], "a" * 501 + " = 1GB", "pytest.ini")


def test_a_marker_has_one_line() -> None:
    """Two lines for one marker contradict each other, sooner or later."""
    with pytest.raises(SettingsError, match="'serial = cpu': the marker occurs twice"):
        read(BY_KEY["markers"], "serial = exclusive\nserial = cpu", "pytest.ini")


def test_sizes_of_rules() -> None:
    """The last equals sign counts; sizes may have fractions and any unit."""
    raw = "test_a.py::test_b[x=1] = 4.5GB\ntests/*_big.py=512 MiB"
    assert parse_rules(raw) == (
        ("test_a.py::test_b[x=1]", 9 * GB // 2),
        ("tests/*_big.py", 512 * MB),
    )


@pytest.mark.parametrize("raw", ["", " ", "a b", "1st", "a-b", "x" * 101, 3, None])
def test_a_wrong_name_of_the_marker(raw: object) -> None:
    """The marker's name is a Python name."""
    with pytest.raises(SettingsError, match="allowed is the name of a marker"):
        read(BY_KEY["marker"], raw, "pytest.ini")
