"""Leases: VRAM that a session claims, so that several sessions of one host share a device."""
