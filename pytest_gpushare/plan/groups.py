"""What the key of a group says of it."""

IN_ORDER = "in order: "
"""How the key of a group begins of which a worker never runs an earlier test after a later one:
it shares parametrised fixtures, which would be set up once more."""
