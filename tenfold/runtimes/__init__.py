"""Runtimes that a model may run in: how each builds, runs and times it."""
