"""Networks that do not fit into memory, one block at a time: from weights on the disk to weights on the disk."""

from tenfold.streaming.block_perplexity import streamed_perplexity
from tenfold.streaming.estimate import Needs
from tenfold.streaming.offloaded import Offloaded, open_offloaded
from tenfold.streaming.stream import Streamed, compress_streamed

__all__ = ["Needs", "Offloaded", "Streamed", "compress_streamed", "open_offloaded", "streamed_perplexity"]
