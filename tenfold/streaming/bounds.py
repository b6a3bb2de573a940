"""A streamed run within the memory and the disk that there are, or none at all."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from itertools import takewhile
from math import prod
from pathlib import Path

from tenfold.calibration.moment_sums import WIDEST
from tenfold.errors import FileError, RecipeError
from tenfold.records.sizes import size_in_words
from tenfold.streaming.estimate import Estimate, Needs, resident
from tenfold.streaming.network import Network

NARROWEST = 64  # sketches of fewer rows say too little
_LEAST = 1 << 20  # bytes of a cache that is of any use

logger = logging.getLogger("tenfold")


def within(network: Network, cache: int, limit: int | None) -> Needs:
    """Return what a run takes with as large a cache, and as wide statistics, as a limit leaves.

    Args:
        network: that is to be compressed.
        cache: bytes of activations that are held at most.
        limit: bytes that the process may take, or None.

    Raises:
        RecipeError: the least that a run takes is more.
    """
    estimate, start, widest = Estimate.of(network), resident(), network.recipe.calibration.max_width
    wanted = estimate.needs(cache, widest, start)
    if limit is None or wanted.memory <= limit:
        return wanted
    known = _widths(estimate) if network.batches else []
    for width in (widest, *(width for width in known if width < (widest or WIDEST))):
        least = estimate.needs(0, width, start)
        if least.memory <= limit:
            return _with_cache(estimate, least, cache, limit)
    msg = (
        f"max_memory is {size_in_words(limit)}, and the least that this takes is {size_in_words(least.memory)} "
        f"({least.in_words()}): allow as much, or give smaller batches"
    )
    raise RecipeError(msg)


def check_disk(needs: Needs, work: Path, out: Path) -> None:
    """Raise FileError where the files of a run do not fit, those of an earlier try counted as free."""
    there = sum(file.stat().st_size for file in work.rglob("*") if file.is_file()) if work.is_dir() else 0
    wanted = {work: needs.disk - there}
    if _nearest(work).stat().st_dev != _nearest(out).stat().st_dev:
        wanted[out] = needs.weights
    for path, size in wanted.items():
        free = shutil.disk_usage(_nearest(path)).free
        if size > free:
            msg = (
                f"the files of {path} take up to {size_in_words(size)}, and {size_in_words(free)} are free there: "
                "make room, choose another folder for the run, or give fewer samples"
            )
            raise FileError(msg)


def with_width(network: Network, width: int | None) -> Network:
    """Return the network with inputs wider than this sketched."""
    recipe = network.recipe
    if width == recipe.calibration.max_width:
        return network
    logger.info("inputs of more than %d numbers are sketched, to stay within the memory that is allowed", width)
    return replace(network, recipe=recipe.replace(calibration=recipe.calibration.replace(max_width=width)))


def _with_cache(estimate: Estimate, least: Needs, cache: int, limit: int) -> Needs:
    """Return the needs with a cache that fits, halved as often as that takes."""
    sizes = (cache >> times for times in range(cache.bit_length()))
    found = (estimate.needs(size, least.max_width, least.start) for size in sizes if size >= _LEAST)
    fits = next((needs for needs in found if needs.memory <= limit), least)
    if fits.max_cache < cache:
        logger.info(
            "%s of activations are held in place of %s, to stay within the memory that is allowed",
            size_in_words(fits.max_cache),
            size_in_words(cache),
        )
    return fits


def _widths(estimate: Estimate) -> list[int]:
    """Return widths beyond which inputs may be sketched, the widest first: each is half of the one before."""
    specs = (spec for own in estimate.specs.values() for spec in own.values())
    most = max((prod(spec.group_shape[2:]) for spec in specs), default=1)
    halves = (most // 2**k for k in range(1, most.bit_length()))
    return list(takewhile(lambda width: width >= NARROWEST, halves))


def _nearest(path: Path) -> Path:
    """Return the folder, which is there already, on whose disk a path will be."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
