"""The command `pytest-gpushare`."""
