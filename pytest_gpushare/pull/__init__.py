"""A worker's side of the dispatch: what it tells of its tests, and how it is sent the next one."""
