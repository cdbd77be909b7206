"""Probe: what NVML, Ollama and the host say, as frozen facts."""
