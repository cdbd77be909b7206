"""The command `pytest-gpushare`: what would happen, what is wrong, what is going on."""
