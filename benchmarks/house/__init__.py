"""Whether the package is still a simple house: its sizes, its seams and its names, each against a target.

    python -m benchmarks.house

prints one line for each, and exits 1 where one is missed. Everything is read from the syntax trees, except for the
imports of ``tenfold.allocation`` and the way of a budget, which are watched while they run.
"""
