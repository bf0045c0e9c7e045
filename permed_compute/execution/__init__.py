"""Launching, watching and ending attempts; the worker that runs inside one."""
