"""tenfold makes trained PyTorch networks smaller and really faster by tensor decomposition."""

from __future__ import annotations

__version__ = "0.1.0"
