"""Count the FLOPs of what runs inside a block: torch's flop counter, plus a list of what it could not count."""

from __future__ import annotations

from collections import Counter
from typing import Any, Self

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tenfold.profiling.formulas import fused_kernels
from tenfold.profiling.negligible import costs_macs


class MacCounter:
    """A context that counts multiply-accumulates while it is open; half of what torch's flop counter finds.

    Attributes:
        uncounted: name -> calls of operations without a formula that may do multiply-accumulates.

    Example:
        >>> import torch
        >>> with MacCounter() as counter:
        ...     _ = torch.ones(2, 3) @ torch.ones(3, 4)
        >>> counter.macs
        24
    """

    def __init__(self) -> None:
        fused = fused_kernels()
        self._fused = set(fused)
        self._flops = FlopCounterMode(display=False, custom_mapping=fused)
        self._watch = _Watch(set(self._flops.flop_registry))

    @property
    def flops(self) -> int:
        """FLOPs counted so far."""
        return self._flops.get_total_flops()

    @property
    def macs(self) -> int:
        """Multiply-accumulates counted so far: half of the FLOPs."""
        return self.flops // 2

    @property
    def fused_macs(self) -> dict[str, int]:
        """MACs, by kernel, that are in ``macs`` by a formula of ours and that torch's flop counter has none for."""
        counts: dict[Any, int] = self._flops.get_flop_counts().get("Global", {})
        return {str(op): flops // 2 for op, flops in counts.items() if op in self._fused}

    @property
    def uncounted(self) -> dict[str, int]:
        """Operations that may do multiply-accumulates and have no formula, with the number of calls."""
        return dict(sorted(self._watch.missed.items()))

    def __enter__(self) -> Self:
        # The watch is entered first, hence called last: it sees composite operations after the counter took them apart.
        self._watch.__enter__()  # type: ignore[no-untyped-call]
        self._flops.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._flops.__exit__(*error)
        self._watch.__exit__(*error)  # type: ignore[no-untyped-call]


class _Watch(TorchDispatchMode):
    """Notes the operations without a formula."""

    def __init__(self, counted: set[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.missed: Counter[str] = Counter()
        self._counted = counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if getattr(func, "_overloadpacket", func) not in self._counted and costs_macs(func):
            self.missed[str(getattr(func, "_overloadpacket", func))] += 1
        return func(*args, **(kwargs or {}))
