"""Comparing a run under the plugin's own scheduler with the same run under stock xdist.

`runs` runs a project and reads what it left; `compare` says how one run differs from
others; `exceptions` lists what is allowed to differ, and why; `generator` draws projects.
Nothing here imports the package: the plugin is met as users meet it, on the command line.
"""
