"""Environment of a result: versions, device and threads."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from tenfold.records import Environment

_PACKAGES = ("numpy", "scipy", "safetensors", "pydantic", "torchvision", "transformers", "timm")
_CPU_INFO = Path("/proc/cpuinfo")


def environment(device: torch.device | str = "cpu") -> Environment:
    """Return the current versions, device and threads.

    Example:
        >>> environment().torch == torch.__version__
        True
    """
    device = torch.device(device)
    versions = {name: _version(name) for name in _PACKAGES}
    if device.type == "cuda" and torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return Environment(
        tenfold=_version("tenfold") or _own_version(),
        python=platform.python_version(),
        torch=str(torch.__version__),
        device=str(device),
        device_name=device_name(device),
        threads=torch.get_num_threads(),
        platform=f"{platform.system()}-{platform.machine()}",
        versions={name: text for name, text in versions.items() if text},
    )


def device_name(device: torch.device) -> str:
    """Return the product name of a device, or an empty string if the system does not say.

    Behind that of a processor stand the instructions that torch uses of it: machines that are rented call processors
    alike that differ in these, and in how long a layer takes.
    """
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return ""
    return f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})".lstrip()


def _processor() -> str:
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _own_version() -> str:
    """Return the version of a source tree that is not installed."""
    import tenfold

    return str(getattr(tenfold, "__version__", "0+unknown"))
