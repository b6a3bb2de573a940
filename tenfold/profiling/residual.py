"""What layers at the end of a residual branch put out, and the shortcut that it is added to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from tenfold.profiling.inputs import tensors_in
from tenfold.profiling.modes import evaluating, layer_by_layer
from tenfold.profiling.replay import SPARE, Forward, Replay, _Reached
from tenfold.profiling.sums import UntilAdded, Uses


class ResidualReplay(Replay):
    """A replay that also knows where outputs are added to a shortcut: torch functions are watched, nothing is traced.

    Found are sums with ``+``, ``+=`` or ``torch.add`` of the very tensor that a module put out, or that dropout handed
    on in evaluation mode. Code that is scripted, or that reshapes the output before the sum, hides it.

    Args:
        model: may be changed between calls, layer by layer.
        batches: inputs as ``call_model`` takes them, on the device of the model.
        forward: runs the model on one batch; ``call_model`` by default.
        limit: bytes of outputs to keep; beyond that things are computed again.
        spare: bytes within which outputs are kept that are cheap to compute again.
        changing: whether the caller may change a layer after having read it.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        *,
        forward: Forward | None = None,
        limit: int = 4 << 30,
        spare: int = SPARE,
        changing: bool = True,
    ) -> None:
        super().__init__(model, batches, forward=forward, limit=limit, spare=spare, changing=changing)
        self._uses: Counter[str] = Counter()
        self._sums: Counter[str] = Counter()
        self._count()

    def is_added(self, path: str) -> bool:
        """Return whether one single thing is made of this module's output: its sum with another tensor of its shape."""
        return self.calls[path] == self._uses[path] == self._sums[path] == 1

    def branches(self, path: str, last: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Iterate over first input and output of the layer at ``path``, and the shortcut its branch is added to.

        Args:
            path: the layer.
            last: the module at the end of its branch, itself or one after it; ``is_added`` must hold for it.
        """
        seen: dict[str, Tensor] = {}

        def enter(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            seen["input"] = next(tensors_in((args, kwargs))).detach().clone()  # an operation in place may follow

        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            seen["output"] = next(tensors_in(output)).detach().clone()  # a hook of the layer may change it

        def met(shortcut: Tensor) -> None:
            raise _Reached(shortcut.detach())

        for number in range(len(self._batches)):
            watch = UntilAdded(met)
            layer, end = self._model.get_submodule(path), self._model.get_submodule(last)
            with ExitStack() as stack:
                stack.enter_context(layer.register_forward_pre_hook(enter, with_kwargs=True))
                stack.enter_context(layer.register_forward_hook(leave, prepend=True))
                stack.enter_context(watch)
                shortcut = self._run(path, number, end.register_forward_hook(watch.expect, prepend=True))
            self._keep_read(path, number, seen["output"])
            yield seen["input"], seen["output"], shortcut

    def _count(self) -> None:
        """Run one batch, to see what is made of the outputs of modules."""
        uses = Uses()

        def leaving(path: str) -> Any:
            def leave(_module: nn.Module, _args: Any, output: Any) -> None:
                if isinstance(output, Tensor):
                    uses.add(path, output)

            return leave

        with ExitStack() as stack:
            for path, module in self._model.named_modules():
                stack.enter_context(module.register_forward_hook(leaving(path), prepend=True))
            with evaluating(self._model), layer_by_layer(), uses:
                self._forward(self._model, self._batches[0])
        for made in uses:
            for path in made.makers:
                self._uses[path] += made.uses
                self._sums[path] += made.sums
