"""The adapter between xdist and the scheduler."""
