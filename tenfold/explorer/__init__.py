"""Plans made anew in a moment, from what an earlier one chose from, and a page to do that by hand. No torch."""

from tenfold.explorer.explorer import Answer, Explorer
from tenfold.explorer.tables import Pick
from tenfold.explorer.wishes import Pin, Wish

__all__ = ["Answer", "Explorer", "Pick", "Pin", "Wish"]
