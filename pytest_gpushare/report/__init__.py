"""Report: what the run tells its user."""
