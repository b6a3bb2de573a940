"""The commands. A module is one, named like it: ``run``, whose docstring is the help, and its ``ORDER`` in the list."""
