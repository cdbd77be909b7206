"""Benchmarks, run by hand (`tox -e bench`), never as timed tests.

Each prints a Markdown table for `docs/explanation/performance.md`.
"""
