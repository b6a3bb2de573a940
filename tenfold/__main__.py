"""``python -m tenfold`` is the command line."""

from tenfold.cli import command

if __name__ == "__main__":
    command()
