"""Adapters for trainers: one module each, which turns trajectories into what that trainer takes.

A module imports its trainer only when it is used, and this package depends on none of them. `docs/training.md` shows
how each is used.
"""
