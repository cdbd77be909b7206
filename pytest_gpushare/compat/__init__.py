"""What is used of the private API of pytest, xdist and execnet."""
