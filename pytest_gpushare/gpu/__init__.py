"""Devices, their VRAM, and who holds it."""
