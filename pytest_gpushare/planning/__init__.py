"""How many workers run, on which devices, and with what caps."""
