"""Random runs whose true history of VRAM is known, and what their reports say of it."""
