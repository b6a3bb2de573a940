"""Integrations with other libraries: the Hub, training loops, boards. Each is imported where it is used."""
