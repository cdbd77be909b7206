"""Run: the plan carried out on workers and on this process."""
