"""Tests that use no model."""

from assistant import shortened


def test_shortened():
    assert shortened("abcdef", 4) == "abc…"
