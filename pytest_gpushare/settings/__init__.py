"""Settings: one table of options, and how its values are found and checked."""
