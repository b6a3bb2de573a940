"""What an error that is small on the samples of a fit costs on other samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_TINY = 1e-300


@dataclass(frozen=True, eq=False)
class HeldOutCurve:
    """Distortions of nested fits of one layer: as the moments that they minimise have them, and as other samples do.

    The second may be a hundred times the first: a layer with more inputs than rows fits these exactly, and errors at
    the positions of a map that point the same way add up where the second moments of positions know each alone. The
    relation of the two is that of a layer and its data rather than of a format, so fits in any format are judged by it.

    Attributes:
        predicted: (n,) by the moments, falling.
        measured: (n,) on samples that were not fitted, falling.
        samples: that ``measured`` is the mean of.

    Example:
        >>> curve = HeldOutCurve.of([8.0, 4.0, 1.0, 0.0], [16.0, 8.0, 9.0, 0.0], samples=50)
        >>> curve(np.array([4.0, 2.0, 0.5, 0.0])).round(2).tolist()
        [9.0, 9.0, 4.5, 0.0]
    """

    predicted: Floats
    measured: Floats
    samples: int

    @classmethod
    def of(cls, predicted: object, measured: object, samples: int) -> HeldOutCurve:
        """Return the curve through distortions at rising ranks; a larger rank costs no more than a smaller one."""
        x, y = np.asarray(predicted, dtype=np.float64), np.asarray(measured, dtype=np.float64)
        y = np.maximum.accumulate(y[::-1])[::-1]
        known = (x > 1e-12 * x.max(initial=0.0)) & (y > 1e-12 * y.max(initial=0.0))
        x, place = np.unique(x[known], return_index=True)
        return cls(x[::-1], y[known][place][::-1], samples)

    @property
    def known(self) -> bool:
        """Whether the samples say anything: some gradient reaches the layer."""
        return len(self.predicted) > 0

    def __call__(self, distortion: Floats) -> Floats:
        """Return what distortions (m,) by the moments are elsewhere: geometric between fits, in proportion beyond."""
        if not self.known:
            return distortion
        x = np.log(np.maximum(distortion, _TINY))
        factors = np.log(self.measured / self.predicted)[::-1]
        return np.asarray(distortion * np.exp(np.interp(x, np.log(self.predicted[::-1]), factors)))
