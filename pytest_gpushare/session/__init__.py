"""One active run in the controller."""
