"""What is wrong with an installation, by an error: one line with what to install. No package is imported."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

TORCH_INDEX = "https://download.pytorch.org/whl"
TORCH_PAGE = "https://pytorch.org/get-started/locally"
_FIRST = 15  # torch 2.0 came with torchvision 0.15, and each later one with the next


def trouble(error: BaseException) -> str | None:
    """Return what is wrong with the installation, and the remedy, if that is what an error is about; else None.

    Its causes are looked at too: libraries that import their parts late hide the first error behind one of their own.

    Example:
        >>> print(trouble(ValueError("the rank is too large")))
        None
    """
    for found in _chain(error):
        for pattern, remedy in _KNOWN:
            match = pattern.search(f"{type(found).__name__}: {found}")
            if match is not None:
                return remedy(match)
    return None


def installed(package: str) -> str | None:
    """Return the version of a package; None if it is not installed.

    Example:
        >>> installed("no_such_package") is None
        True
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def torch_index(torch: str | None) -> str:
    """Return the options by which pip finds builds for the same device as that of a version of torch.

    Example:
        >>> torch_index("2.13.0+cpu"), torch_index("2.13.0")
        (' --index-url https://download.pytorch.org/whl/cpu', '')
    """
    build = (torch or "").partition("+")[2]
    return f" --index-url {TORCH_INDEX}/{build}" if build else ""


def matching_torchvision(torch: str | None) -> str:
    """Return the requirement of the torchvision that belongs to a version of torch.

    Example:
        >>> matching_torchvision("2.13.0+cpu"), matching_torchvision(None)
        ('torchvision==0.28.*', 'torchvision')
    """
    known = re.match(r"2\.(\d+)", torch or "")
    return "torchvision" if known is None else f"torchvision==0.{int(known[1]) + _FIRST}.*"


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def _torchvision(_: re.Match[str]) -> str:
    torch = installed("torch")
    pip = f"pip install --force-reinstall --no-deps '{matching_torchvision(torch)}'{torch_index(torch)}"
    return (
        f"torchvision {installed('torchvision')} does not fit torch {torch}: its operators do not load (another "
        f"version, or a build for another device). Install the one that belongs to it: {pip}"
    )


def _no_torch(_: re.Match[str]) -> str:
    return f"torch is not installed: see {TORCH_PAGE}, on a machine without GPU pip install torch{torch_index('+cpu')}"


def _torch_for_gpus(match: re.Match[str]) -> str:
    return (
        f"torch {installed('torch')} does not load, {match['library']} is missing: it is a build for NVIDIA GPUs. "
        f"Install its CUDA libraries, or the build for CPUs: pip install --force-reinstall torch{torch_index('+cpu')}"
    )


def _torch_for_cpus(_: re.Match[str]) -> str:
    return f"torch {installed('torch')} is a build for CPUs: install one for CUDA, see {TORCH_PAGE}"


def _old_driver(_: re.Match[str]) -> str:
    torch = installed("torch")
    return f"the NVIDIA driver is too old for torch {torch}: update the driver, or see {TORCH_PAGE} for an older CUDA"


def _old_torch(match: re.Match[str]) -> str:
    return (
        f"transformers {installed('transformers')} does not work with torch {installed('torch')}, it wants "
        f"{match['wanted'] or 'a newer one'}: upgrade torch, or install an older transformers"
    )


def _numpy(_: re.Match[str]) -> str:
    return (
        f"a package was compiled for another NumPy than {installed('numpy')}: upgrade the one that the traceback names "
        "(pip install --upgrade --force-reinstall NAME), or install the NumPy that it wants"
    )


# By what the error says; the first that fits counts.
_KNOWN: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"operator torchvision::\w+ does not exist|Couldn't load custom C\+\+ ops"), _torchvision),
    (re.compile(r"torchvision\S*\.so.*undefined symbol|undefined symbol.*torchvision", re.DOTALL), _torchvision),
    (re.compile(r"ModuleNotFoundError: No module named 'torch'"), _no_torch),
    (re.compile(r"(?P<library>lib(?:cu[a-z]+|nccl|torch_cuda)[^\s:]*): cannot open"), _torch_for_gpus),
    (re.compile(r"not compiled with CUDA enabled"), _torch_for_cpus),
    (re.compile(r"NVIDIA driver on your system is too old"), _old_driver),
    (re.compile(r"requires the PyTorch library but it was not found(?P<wanted>)"), _old_torch),
    (re.compile(r"PyTorch (?P<wanted>>= ?[\d.]+) is required but"), _old_torch),
    (re.compile(r"compiled using NumPy 1\.x|numpy\.dtype size changed|_ARRAY_API not found"), _numpy),
)
