"""A second server on the devices of a test: `neighbour` is the module that it takes to add one."""
