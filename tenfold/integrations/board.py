"""Log stages, ranks, scores and ADMM residuals to TensorBoard or any other logger of scalars."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tenfold.errors import require
from tenfold.records import RunRecord, StageRecord
from tenfold.training.low_rank.admm import Residual


class Board:
    """Writes scalars under the names ``stage/``, ``rank/LAYER/``, ``score/``, ``admm/``.

    Args:
        writer: has ``add_scalar(tag, value, step)``, as the ``SummaryWriter`` of torch does.

    Example:
        >>> class Printer:
        ...     def add_scalar(self, tag, value, step):
        ...         print(tag, round(value, 3), step)
        >>> Board(Printer()).admm({"fc": Residual(primal=0.5, dual=0.1, rho=1.0)}, 3)
        admm/primal/fc 0.5 3
        admm/dual/fc 0.1 3
        admm/rho/fc 1.0 3
        admm/largest_primal 0.5 3
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    @classmethod
    def to(cls, folder: str | Path) -> Self:
        """Return a board that writes event files for TensorBoard into a folder."""
        require("tensorboard", "train")
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter
        return cls(writer(log_dir=str(folder)))

    def stage(self, record: StageRecord) -> None:
        """Write costs, ranks and scores of a stage."""
        step = record.index
        self._add("stage/params", record.after.params, step)
        self._add("stage/macs", record.after.macs, step)
        for path, layer in record.layers.items():
            for name, rank in layer.rank.items():
                self._add(f"rank/{path}/{name}", rank, step)
            if layer.rel_error is not None:
                self._add(f"rel_error/{path}", layer.rel_error, step)
        for name, score in record.scores.items():
            self._add(f"score/{name}", score, step)

    def admm(self, residuals: Mapping[str, Residual], step: int) -> None:
        """Write the ADMM residuals of each layer, and the largest primal one."""
        for path, residual in residuals.items():
            self._add(f"admm/primal/{path}", residual.primal, step)
            self._add(f"admm/dual/{path}", residual.dual, step)
            self._add(f"admm/rho/{path}", residual.rho, step)
        if residuals:
            self._add("admm/largest_primal", max(residual.primal for residual in residuals.values()), step)

    def run(self, record: RunRecord) -> None:
        """Write a whole run from its record: stages, scores and the epochs of its training."""
        for stage in record.stages:
            self.stage(stage)
        for step, epoch in enumerate(record.tuning, start=1):
            for name, value in epoch.items():
                if isinstance(value, int | float) and name not in {"epoch", "stage"}:
                    self._add(f"tuning/{name}", value, step)
        if not record.stages:
            for name, score in record.scores.items():
                self._add(f"score/{name}", score, 0)

    def _add(self, tag: str, value: float, step: int) -> None:
        self.writer.add_scalar(tag, float(value), step)
