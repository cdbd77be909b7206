"""Checks on a real GPU, run by hand: `python tests/gpu/run.py`. Not part of the test suite."""
