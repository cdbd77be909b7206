"""What all unit tests share."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# An example takes as long as a busy machine lets it: that is no failure.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
