"""Compress networks that do not fit into memory: one block at a time, from weights on the disk to weights on the disk."""
