"""Experiments: a YAML file in, JSON and Markdown results out."""
