"""A network whose weights lie on the disk, and what is asked of it: all that the passes over its parts share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tenfold.calibration import judged_apart
from tenfold.checkpoint.shards import WeightFiles
from tenfold.errors import DataError
from tenfold.profiling import environment, profile
from tenfold.records import Profile, Recipe
from tenfold.streaming.chain import Chain, find_chain, meta_inputs
from tenfold.streaming.part_tables import kept_of_whole, parts_of
from tenfold.streaming.skeletons import fill_, on_meta, stored_names
from tenfold.tracing import copied
from tenfold.tracing.samples import count_samples, parted


@dataclass(frozen=True, eq=False)
class Network:
    """A network of blocks, without its weights.

    Attributes:
        skeleton: the model, its parameters on the meta device.
        files: with its weights.
        recipe: what is wanted.
        chain: of its blocks.
        profile: of the whole.
        parts: paths of the layers by part.
        kept: layers that stay whatever the data say, with the reason.
        names: under which name each tensor is stored.
        example: inputs that costs are counted for.
        batches: inputs; first those that decide, then those on which the result is compared with the original.
        decisive: how many of the batches decide.
        fitting: numbers of those that are fitted to.
        judging: numbers of those that judge.
    """

    skeleton: nn.Module
    files: WeightFiles
    recipe: Recipe
    chain: Chain
    profile: Profile
    parts: Mapping[str, tuple[str, ...]]
    kept: Mapping[str, str]
    names: dict[str, str] = field(repr=False)
    example: Any = field(repr=False)
    batches: Sequence[Any] = field(repr=False)
    decisive: int
    fitting: Sequence[int] = field(repr=False)
    judging: Sequence[int] = field(repr=False)

    @classmethod
    def of(
        cls,
        skeleton: nn.Module,
        files: WeightFiles,
        recipe: Recipe,
        example: Any,
        batches: Sequence[Any],
        blocks: Sequence[str] | None = None,
    ) -> Network:
        """Look at a model, its weights and the data, before any work begins.

        Raises:
            CheckpointError: the weights are not those of the model.
            PlanError: the model has no blocks in a row.
            DataError: too few batches.
            UnknownNameError: a pattern that names nothing.
        """
        hollow = on_meta(skeleton)
        inputs = meta_inputs(example)
        chain = find_chain(hollow, inputs, blocks)
        names = stored_names(skeleton, files)
        cost = profile(hollow, inputs).replace(environment=environment())
        share = recipe.calibration.held_out_of(count_samples(batches)) if batches else 0.0
        if share and share * len(batches) < 2:
            msg = f"there are {len(batches)} calibration batches, too few to hold some out: pass 20 or more"
            raise DataError(msg)
        rest, held = parted(skeleton, list(range(len(batches))), share) if share else (range(len(batches)), [])
        ordered = [batches[i] for i in (*rest, *held)]
        fitting, judging = judged_apart(ordered[: len(rest)]) if batches else ([], [])
        return cls(
            skeleton=skeleton,
            files=files,
            recipe=recipe,
            chain=chain,
            profile=cost,
            parts=parts_of(hollow, inputs, chain, cost),
            kept=kept_of_whole(cost, recipe),
            names=names,
            example=example,
            batches=ordered,
            decisive=len(rest),
            fitting=fitting,
            judging=judging,
        )

    @property
    def measured(self) -> range:
        """Numbers of the batches that decide."""
        return range(self.decisive)

    @contextmanager
    def block(self, number: int) -> Iterator[nn.Module]:
        """Yield a block with its weights."""
        path = self.chain.blocks[number]
        yield fill_(copied(self.skeleton.get_submodule(path)), self.files, self.names, f"{path}.").eval()

    @contextmanager
    def outer(self) -> Iterator[nn.Module]:
        """Yield the model with the weights that lie outside of its blocks; those within are on the meta device."""
        outer = {name: stored for name, stored in self.names.items() if not name.startswith(self.chain.prefixes)}
        yield fill_(copied(self.skeleton), self.files, outer).eval()
