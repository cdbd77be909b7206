"""Needs: from markers, aliases, rules and what was learned, weighed."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpushare.config.settings import parse_aliases, parse_rules
from pytest_gpushare.scheduler.needs import (
    Declared,
    Mark,
    Need,
    Patterns,
    Wanted,
    declared,
    means_cpu,
    wanted,
)
from pytest_gpushare.units import GB, MB

ALIASES = parse_aliases(
    "multi_gpu = devices=2\nprofiled_vram_gib(n) = vram={n}GB\nserial = exclusive\n"
    "not_device_test = cpu\nneeds_cuda = required\non_gpu = gpu"
)


def said(*marks: Mark) -> Declared:
    return declared(marks, "gpu", ALIASES)


def gpu(**kwargs: Any) -> Mark:
    return Mark("gpu", (), kwargs)


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ([], Declared()),
        ([Mark("slow", (1,))], Declared()),
        ([gpu()], Declared("gpu")),
        ([gpu(vram="6GB")], Declared("gpu", 6 * GB)),
        ([gpu(vram="4.5 GiB", devices=2)], Declared("gpu", 9 * GB // 2, 2)),
        ([gpu(required=True)], Declared("gpu", required=True)),
        ([gpu(exclusive=True)], Declared("gpu", exclusive=True)),
        ([Mark("multi_gpu")], Declared("gpu", devices=2)),
        ([Mark("profiled_vram_gib", (4.5,))], Declared("gpu", 9 * GB // 2)),
        ([Mark("profiled_vram_gib", (), {"n": 4})], Declared("gpu", 4 * GB)),
        ([Mark("serial"), Mark("needs_cuda")], Declared("gpu", None, None, True, True)),
        ([Mark("on_gpu")], Declared("gpu")),
        ([Mark("not_device_test")], Declared("cpu")),
    ],
)
def test_markers(marks: list[Mark], expected: Declared) -> None:
    """What each marker says."""
    assert said(*marks) == expected


def test_the_closest_marker_wins_thing_by_thing() -> None:
    """A function's `vram` beats its module's; what it does not say is the module's."""
    near, far = gpu(vram="8GB"), gpu(vram="4GB", devices=2, exclusive=True)
    assert said(near, far) == Declared("gpu", 8 * GB, 2, True)
    assert said(gpu(exclusive=False), far).exclusive is False


def test_the_own_marker_goes_before_aliases() -> None:
    """Who wrote `gpu(vram=...)` into a suite with aliases means it."""
    assert said(Mark("profiled_vram_gib", (4,)), gpu(vram="6GB")).vram == 6 * GB


def test_the_closest_marker_decides_on_cpu_or_gpu() -> None:
    """A CPU test in a GPU module, and the other way round."""
    assert said(Mark("not_device_test"), gpu(vram="8GB")) == Declared("cpu")
    assert said(gpu(), Mark("not_device_test")) == Declared("gpu")


ALLOWED = 'allowed is gpu(vram="6GB", devices=2, exclusive=True, required=True)'


@pytest.mark.parametrize(
    ("mark", "text"),
    [
        (Mark("gpu", ("6GB",)), f"@pytest.mark.gpu('6GB'): takes keywords alone: {ALLOWED}"),
        (
            gpu(vram=6),
            f"@pytest.mark.gpu(vram=6): {ALLOWED}; vram is a size with its unit, in quotes",
        ),
        (
            gpu(vram="6"),
            f"@pytest.mark.gpu(vram='6'): {ALLOWED}; vram is a size with its unit, in quotes",
        ),
        (
            gpu(devices="2"),
            "@pytest.mark.gpu(devices='2'): devices is a number from 1 to 64",
        ),
        (gpu(devices=True), "@pytest.mark.gpu(devices=True): devices is a number from 1 to 64"),
        (gpu(devices=0), "@pytest.mark.gpu(devices=0): devices is a number from 1 to 64"),
        (gpu(exclusive=1), "@pytest.mark.gpu(exclusive=1): exclusive is True or False"),
        (
            gpu(memory="6GB"),
            f"@pytest.mark.gpu(memory='6GB'): unknown keyword memory: {ALLOWED}; where the marker "
            "means something else in this suite, name another with gpu_share_marker",
        ),
        (
            Mark("profiled_vram_gib"),
            "@pytest.mark.profiled_vram_gib(): by gpu_share_markers, line "
            "'profiled_vram_gib(n) = vram={n}GB': n is a number or a text",
        ),
        (
            Mark("profiled_vram_gib", ("much",)),
            "@pytest.mark.profiled_vram_gib('much'): by gpu_share_markers, line "
            "'profiled_vram_gib(n) = vram={n}GB': vram: muchGB",
        ),
    ],
)
def test_a_marker_that_cannot_be_understood(mark: Mark, text: str) -> None:
    """The test is refused with the marker, what is allowed, and where an alias stands."""
    assert said(mark) == Declared(route="gpu", refusal=text)


def test_a_marker_with_anything_in_it() -> None:
    """A value that cannot even be shown is refused as well."""

    class Shy:
        def __repr__(self) -> str:
            raise RuntimeError

    assert said(gpu(vram=Shy())).refusal.startswith("@pytest.mark.gpu(...): allowed is")


RULES = Patterns(parse_rules("tests/test_llm.py::test_small = 2GB\ntests/test_llm.py = 8GB"))


def test_precedence() -> None:
    """Marker > rule > learned > slot."""
    nodeid = "tests/test_llm.py::test_a"
    marker = Declared("gpu", 6 * GB, exclusive=True)
    assert wanted(nodeid, marker, RULES, learned=GB) == Wanted(
        True, Need(6 * GB, exclusive=True, source="marker")
    )
    assert wanted(nodeid, Declared("gpu"), RULES, learned=GB) == Wanted(
        True, Need(8 * GB, source="rule")
    )
    assert wanted("other.py::test", Declared("gpu"), RULES, learned=GB) == Wanted(
        True, Need(GB, source="learned")
    )
    assert wanted("other.py::test", Declared("gpu"), RULES) == Wanted(True, Need())


def test_unmarked() -> None:
    """A rule makes a GPU test; what was learned does not; a CPU test needs nothing."""
    assert wanted("tests/test_llm.py::test_small", Declared(), RULES).marked
    assert wanted("other.py::test", Declared(), RULES, learned=GB) == Wanted(
        False, Need(GB, source="learned")
    )
    assert wanted("other.py::test", Declared(), RULES) == Wanted(False, None)
    assert wanted("tests/test_llm.py::test_a", Declared("cpu"), RULES) == Wanted(
        False, Need(0, source="marker")
    )


def test_inverse_marker() -> None:
    """Where a marker tells the CPU tests, the others are GPU tests."""
    assert means_cpu(ALIASES)
    assert not means_cpu(parse_aliases("serial = exclusive"))
    assert wanted("other.py::test", Declared(), RULES, gpu_unless_marked=True).marked


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("tests/test_a.py", ["tests/test_a.py::test_b", "tests/test_a.py::C::test_b[1]"],
         ["tests/test_ab.py::test_b", "x/tests/test_a.py::test_b"]),
        ("tests", ["tests/test_a.py::test_b"], ["tests2/test_a.py::test_b"]),
        ("tests/", ["tests/test_a.py::test_b"], []),
        ("a.py::test_b", ["a.py::test_b", "a.py::test_b[1-x]"],
         ["a.py::test_bc", "a.py::C::test_b"]),
        ("a.py::C", ["a.py::C::test_b", "a.py::C::D::test_b[1]"], ["a.py::CC::test_b"]),
        ("a.py::test_b[1b]", ["a.py::test_b[1b]"], ["a.py::test_b1", "a.py::test_b[1]"]),
        ("a.py::test_b[7*", ["a.py::test_b[7b-x]"], ["a.py::test_b[8b-7]"]),
        ("*llm*", ["tests/test_llm.py::test_a", "a.py::test_llm"], ["a.py::test_b"]),
        ("tests/*/test_?.py", ["tests/x/y/test_a.py::test_b"], ["tests/x/test_ab.py::test_b"]),
        ("*::test_big", ["a.py::C::test_big[1]", "a.py::test_big"], ["a.py::test_bigger"]),
        ("*a*b*c", ["xaxbxc", "abbc::d"], ["acb", "abcd"]),
    ],
)  # fmt: skip
def test_patterns(pattern: str, matching: list[str], others: list[str]) -> None:
    """Names as on pytest's command line, and wildcards; brackets are plain."""
    found = Patterns([(pattern, 1)])
    assert [name for name in matching if found.find(name) is None] == []
    assert [name for name in others if found.find(name) is not None] == []


def test_the_first_pattern_wins() -> None:
    """In the order of the lines, wildcards or not."""
    both = [("*::test_b", 1), ("a.py", 2)]
    assert Patterns(both).find("a.py::test_b") == 1
    assert Patterns(both[::-1]).find("a.py::test_b") == 2
    assert Patterns([("a.py", 1), ("a.py", 2)]).find("a.py::test_b") == 1


@given(st.text("ab*?[/:", max_size=12), st.text("ab[/:", max_size=12))
def test_patterns_against_a_slow_way(pattern: str, nodeid: str) -> None:
    """The same as trying each cut of the node id with a plain regular expression."""
    name = pattern.replace("\\", "/").rstrip("/") if "::" not in pattern else pattern
    if "*" not in name and "?" not in name:
        return
    text = "".join({"*": ".*", "?": "."}.get(c, re.escape(c)) for c in name)
    cuts = [
        nodeid[:i] for i in range(len(nodeid) + 1)
        if i == len(nodeid) or nodeid[i] in "/[" or nodeid[i:].startswith("::")
    ]  # fmt: skip
    expected = any(re.fullmatch(text, cut, re.DOTALL) for cut in cuts)
    assert (Patterns([(pattern, 1)]).find(nodeid) == 1) is expected


def test_many_stars() -> None:
    """A pattern of many stars costs no more than a glance."""
    pattern = Patterns([("*a" * 100 + "*b", 1)])
    before = time.perf_counter()
    assert pattern.find("a" * 2000) is None
    assert time.perf_counter() - before < 5


def test_sizes_are_rounded_up() -> None:
    """A fraction of a byte counts as one."""
    assert said(gpu(vram="0.1MB")).vram == -(-MB // 10)
