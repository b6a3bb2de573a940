"""Broken installations, faked: one line that names what is wrong and what to install."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tenfold import diagnosis
from tenfold.cli import main
from tenfold.diagnosis import matching_torchvision, trouble
from tenfold.errors import InstallationError, MissingExtraError, naming_trouble, require

VERSIONS = {"torch": "2.13.0+cpu", "torchvision": "0.27.0", "transformers": "5.1.0", "numpy": "2.4.6"}
NMS = RuntimeError("operator torchvision::nms does not exist")
LACKING = AssertionError("Torch not compiled with CUDA enabled")
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "installed", VERSIONS.get)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Return a function that writes a package with this code, which can be imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    written = []

    def write(name: str, code: str) -> None:
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        importlib.invalidate_caches()
        written.append(name)

    yield write
    for name in written:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError("operator torchvision::nms does not exist"),
            ("torchvision 0.27.0", "'torchvision==0.28.*'", "/cpu"),
        ),
        (RuntimeError("Couldn't load custom C++ ops. This can happen if ..."), ("torchvision 0.27.0", "2.13.0+cpu")),
        (OSError("torchvision/_C.so: undefined symbol: _ZN3c10"), ("'torchvision==0.28.*'",)),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), ("torch is not installed", "get-started")),
        (OSError("libcudart.so.12: cannot open shared object file"), ("libcudart.so.12 is missing", "whl/cpu")),
        (ImportError("libtorch_cuda.so: cannot open shared object file"), ("build for NVIDIA GPUs", "whl/cpu")),
        (AssertionError("Torch not compiled with CUDA enabled"), ("a build for CPUs", "get-started")),
        (RuntimeError("The NVIDIA driver on your system is too old (found version 11040)"), ("update the driver",)),
        (
            ImportError("AutoModel requires the PyTorch library but it was not found in"),
            ("transformers 5.1.0", "newer"),
        ),
        (ImportError("PyTorch >= 2.15 is required but found 2.13"), ("it wants >= 2.15", "upgrade torch")),
        (ImportError("A module that was compiled using NumPy 1.x cannot be run"), ("another NumPy than 2.4.6",)),
        (ValueError("numpy.dtype size changed, may indicate binary incompatibility"), ("--force-reinstall",)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_each_trouble_is_named_with_its_remedy(error: Exception, words: tuple[str, ...]) -> None:
    line = trouble(error)
    assert line is not None
    assert "\n" not in line
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    "error", [ValueError("the rank is too large"), ImportError("no"), KeyError("torch"), OSError()]
)
def test_other_errors_are_none(error: Exception) -> None:
    assert trouble(error) is None


def test_it_is_found_behind_the_errors_of_others() -> None:
    try:
        try:
            raise NMS
        except RuntimeError as inner:
            msg = "Could not import module 'ViTModel'. Are this object's requirements defined correctly?"
            raise ModuleNotFoundError(msg) from inner
    except ModuleNotFoundError as outer:
        error = outer
    assert "torchvision 0.27.0 does not fit" in str(trouble(error))
    with pytest.raises(InstallationError, match=r"torchvision 0\.27\.0 does not fit"), naming_trouble():
        raise error


def test_versions_belong_together() -> None:
    pairs = {"2.4.1": "0.19", "2.6.0+cu124": "0.21", "2.13.0+cpu": "0.28"}
    assert {torch: matching_torchvision(torch) for torch in pairs} == {
        torch: f"torchvision=={vision}.*" for torch, vision in pairs.items()
    }
    assert matching_torchvision("3.0") == "torchvision"


def test_a_package_that_is_missing_asks_for_its_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"no_such is not installed.*tenfold\[vision\]"):
        require("no_such", "vision")
    with pytest.raises(MissingExtraError, match=r"json\.no_such is not installed"):
        require("json.no_such", "vision")


def test_a_package_that_lacks_another_or_breaks_is_not_said_to_be_missing(
    package: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tenfold.errors.installed", {"needy": "1.0", "broken": "1.0", "mismatched": "1.0"}.get)
    package("needy", "import no_such_dependency")
    with pytest.raises(InstallationError, match=r"needy is installed but does not import: it needs no_such_dependency"):
        require("needy", "hf")
    package("broken", "raise RuntimeError('line one\\nline two')")
    with pytest.raises(InstallationError, match=r"broken .* does not import: line one\. Install it again: .*\[hf\]"):
        require("broken", "hf")
    package("mismatched", "raise RuntimeError('operator torchvision::nms does not exist')")
    with pytest.raises(InstallationError, match="does not fit torch"):
        require("mismatched", "vision")


def late(name: str) -> ModuleType:
    """Return a library that imports its parts late, as transformers does, and cannot."""
    library = ModuleType(name)

    def get(part: str) -> object:
        msg = f"Could not import module {part!r}. Are this object's requirements defined correctly?"
        raise ModuleNotFoundError(msg) from NMS

    library.__getattr__ = get  # type: ignore[method-assign] # a module's own hook
    return library


def test_transformers_behind_a_broken_torchvision_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}', encoding="utf-8")
    monkeypatch.setitem(sys.modules, "transformers", late("transformers"))
    assert main(["profile", "--task", f"hf:{tmp_path}"]) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("tenfold: error: torchvision 0.27.0 does not fit torch 2.13.0+cpu")


def test_a_device_that_the_build_lacks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: object, **__: object) -> None:
        raise LACKING

    monkeypatch.setattr("torch.zeros", lacking)
    assert main(["profile", "--task", "digits", "--device", "cuda"]) == 1
    assert "a build for CPUs: install one for CUDA" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs the extra vision")
def test_what_users_meet_in_this_environment_without_the_stand_ins_of_the_tests() -> None:
    """Either torchvision imports, or it is said why not; the other tests run with stand-ins for its operators."""
    code = (
        "from tenfold.errors import InstallationError, require\n"
        "try:\n    require('torchvision', 'vision')\n"
        "except InstallationError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "" or "Install the one that belongs to it: pip install" in done.stdout
