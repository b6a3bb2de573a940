"""Plans made anew in a moment, from what an earlier one chose from, and a page to do that by hand. No torch."""

from tenfold.exploring.explorer import Answer, Explorer
from tenfold.exploring.tables import Pick
from tenfold.exploring.wishes import Pin, Wish

__all__ = ["Answer", "Explorer", "Pick", "Pin", "Wish"]
