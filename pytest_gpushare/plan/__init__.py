"""Plan: how many workers, where, and why. Pure: no I/O, no clock, no pytest."""
