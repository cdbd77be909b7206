"""A run in miniature: workers and VRAM by a clock of their own, driven by the dispatcher."""

from dispatching.workload import makespan_by_bound
from dispatching.world import Device, Process, Script, World

__all__ = ["Device", "Process", "Script", "World", "makespan_by_bound"]
