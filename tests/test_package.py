"""The package as others receive it: light to import, typed, complete, and open to every later version of torch."""

from __future__ import annotations

import ast
import email
import email.policy
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml

import tenfold
from tests.page_script import STARTS, without_numbers
from tests.test_docs import PATHS, SHOWN, snippets

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tenfold"
SOURCES = sorted(PACKAGE.rglob("*.py"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = sorted((PACKAGE / "reporting" / "page").iterdir())  # of reports and the explorer
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
SELF = "tenfold["

NOT_AT_IMPORT = {
    *("PIL", "accelerate", "huggingface_hub", "matplotlib", "onnx", "onnxruntime", "onnxscript", "pyarrow", "sklearn"),
    *("starlette", "tensorboard", "tensorly", "timm", "torchvision", "transformers", "uvicorn"),  # optional
    *("scipy", "typer", "torch._dynamo", "torch._inductor", "torch.utils.tensorboard"),  # slow
}


def canonical(requirement: str) -> str:
    """Return the name of a requirement as indexes spell it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~ ;]", requirement)[0]).lower()


def expand(extra: str) -> set[str]:
    """Return the names of all that an extra brings, references to other extras followed."""
    names: set[str] = set()
    for requirement in EXTRAS[extra]:
        if requirement.startswith(SELF):
            names |= set().union(*(expand(e.strip()) for e in requirement[len(SELF) : -1].split(",")))
        else:
            names.add(canonical(requirement))
    return names


def loaded_by(statement: str) -> set[str]:
    """Return the modules that a fresh interpreter holds after ``statement``."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(done.stdout))


def test_import_is_light_and_silent() -> None:
    """What is optional or slow is loaded by whoever uses it, not by everyone."""
    added = loaded_by("import tenfold") - loaded_by("import torch")
    assert "tenfold" in added
    assert added & NOT_AT_IMPORT == set()


def test_records_choosing_and_the_explorer_load_without_torch() -> None:
    """The package itself needs torch, so its place is taken by an empty one whose rooms can be imported."""
    code = f"""if True:
        import sys, types
        sys.modules["torch"] = None  # any import of it fails
        package = sys.modules["tenfold"] = types.ModuleType("tenfold")
        package.__path__ = [{str(PACKAGE)!r}]
        package.__version__ = "0"
        import tenfold.records
        import tenfold.allocation
        tenfold.allocation.RULES.items()  # with all rules loaded
        import tenfold.explorer.server
        """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version_is_said_once() -> None:
    assert "version" in PROJECT["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.?\w+)?", tenfold.__version__)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{tenfold.__version__}]" in changelog


def test_public_names_say_what_they_are_and_when_to_use_them() -> None:
    assert len(tenfold.__all__) == len(set(tenfold.__all__))
    undocumented = [name for name in tenfold.__all__ if not (getattr(tenfold, name).__doc__ or "").strip()]
    assert undocumented == []
    advised = re.compile(r"(^|[.:] |\n\n?)Use ", re.MULTILINE)
    silent = [name for name in tenfold.__all__ if not advised.search(inspect.getdoc(getattr(tenfold, name)) or "")]
    assert silent == [], "no sentence of the docstring begins with Use"


def test_dir_names_what_is_public_and_nothing_else() -> None:
    import tenfold.formats  # a room that was imported is no public name

    assert {name for name in dir(tenfold) if not name.startswith("__")} == set(tenfold.__all__)
    assert "calibrate" in tenfold.__all__
    assert tenfold.calibrate.__module__ == "tenfold.calibration.calibrate"


def test_help_of_the_main_verb_starts_with_an_example() -> None:
    _, first, *_ = (inspect.getdoc(tenfold.compress) or "").split("\n\n")
    assert first.startswith("Example:")
    assert "compress(" in first


def test_names_that_documents_give_are_there() -> None:
    """A reader may type every ``tenfold.x`` that README, a page or a docstring shows."""
    texts = {path: path.read_text(encoding="utf-8") for path in (*DOCUMENTS, *SOURCES)}
    spelled = re.compile(r"(?<![\w./:-])tenfold\.([a-z_]+|[A-Z]\w+)(?=[(`])")
    given = {(name, path.name) for path, text in texts.items() for name in spelled.findall(text)}
    rooms = {path.stem for path in PACKAGE.iterdir()} | {"plugins"}  # a group of entry points
    assert {"compress", "load"} <= {name for name, _ in given}
    assert [(name, where) for name, where in sorted(given) if name not in {*tenfold.__all__, *rooms}] == []


def test_command_is_installed() -> None:
    (command,) = [e for e in entry_points(group="console_scripts") if e.name == "tenfold"]
    assert callable(command.load())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    for target in ("wheel", "sdist"):
        build = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
        subprocess.run(build, check=True, capture_output=True, cwd=ROOT)
    return folder


def test_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"tenfold-{tenfold.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {str(path.relative_to(ROOT)) for path in (*SOURCES, *PAGES)} | {"tenfold/py.typed"} <= names
    assert {path.suffix for path in PAGES} == {".css", ".html", ".js"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names} == {"tenfold", f"tenfold-{tenfold.__version__}.dist-info"}


def test_sdist_holds_what_a_packager_needs(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    wanted = {"README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md", "hatch_build.py", "tests/test_laws.py"}
    assert wanted - names == set()


def description(wheel: Path) -> str:
    """Return the long description in a wheel's metadata."""
    with zipfile.ZipFile(wheel) as opened:
        name = next(name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(opened.read(name), policy=email.policy.default).get_content()


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that the wheel alone is installed into, as in a fresh environment."""
    (wheel,) = built.glob("*.whl")
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    return site


def run_installed(site: Path, empty: Path, *arguments: str, also: str = "") -> str:
    """Return what a fresh interpreter prints in an empty folder, with the package from the wheel."""
    environment = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{also}", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    run = partial(subprocess.run, cwd=empty, env=environment, capture_output=True, text=True, check=False)
    done = run([sys.executable, *arguments])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_the_wheel_alone_runs_the_quick_start(built: Path, installed: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    quick_start = [block.code for block in snippets(description(wheel)) if block.reason is None]
    assert any("tenfold.compress(" in code for code in quick_start)
    shown = run_installed(installed, tmp_path, "-c", "\n".join([*quick_start, "print(tenfold.__file__)"]))
    assert shown.splitlines()[-1] == str(installed / "tenfold" / "__init__.py")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.search(r"```text\n +before .*?```", readme, re.DOTALL)
    assert table is not None
    for name in ("parameters", "MACs", "size"):  # counts, which every machine prints alike
        (line,) = re.findall(rf"^ {name} .*$", table[0], re.MULTILINE)
        assert line.split() in [row.split() for row in shown.splitlines()]
    assert run_installed(installed, tmp_path, "-m", "tenfold", "--version").split()[-1] == tenfold.__version__


def test_the_wheel_alone_runs_the_four_paths(installed: Path, trained_digits: Path, tmp_path: Path) -> None:
    """One fresh interpreter for the four pages, which prints what they show."""
    pages = [str(page) for page in PATHS]
    module = str(ROOT / "tests" / "page_script.py")
    printed = run_installed(installed, tmp_path, module, str(trained_digits), *pages, also=str(ROOT))
    parts = re.split(rf"^{STARTS} (\w+)$", printed, flags=re.MULTILINE)
    assert parts[1::2] == [page.stem for page in PATHS]
    missing = []
    for page, part in zip(PATHS, parts[2::2], strict=True):
        lines = {without_numbers(line) for line in part.splitlines()}
        shown = [line for block in SHOWN.findall(page.read_text(encoding="utf-8")) for line in block.splitlines()]
        missing += [line for line in shown if line.strip() not in {"", "..."} and without_numbers(line) not in lines]
    assert missing == []


def test_the_long_description_leads_nowhere_but_out(built: Path) -> None:
    """An index shows it away from the repository: links are absolute, or plain text."""
    (wheel,) = built.glob("*.whl")
    text = description(wheel)
    assert text.startswith("# tenfold")
    assert re.findall(r"\]\((?!\w+:|#)[^)]*\)", text) == []
    assert "<picture>" not in text
    hook = runpy.run_path(str(ROOT / "hatch_build.py"))
    text = hook["long_description"]((ROOT / "README.md").read_text(encoding="utf-8"), "https://example.org/a/tenfold")
    assert "](https://example.org/a/tenfold/blob/main/docs/faq.md)" in text
    assert re.findall(r"\]\((?!\w+:|#)[^)]*\)", text) == []
    assert hook["addresses"]("https://example.org/a/tenfold")["Source"] == "https://example.org/a/tenfold"


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "type"} <= set(cited)
    assert (cited["version"], cited["license"]) == (tenfold.__version__, PROJECT["license"])


@pytest.mark.parametrize("requirement", [*PROJECT["dependencies"], *(r for e in EXTRAS.values() for r in e)])
def test_requirements_have_lower_bounds_only(requirement: str) -> None:
    assert requirement.startswith(SELF) or re.fullmatch(r"[\w.-]+(\[[\w,]+\])?>=[\d.]+", requirement)


def test_tested_versions_cover_what_the_make_targets_install() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", pin)] == []  # exact, no local versions
    wanted = {canonical(r) for r in PROJECT["dependencies"]} | expand("demo") | expand("dev")
    assert wanted - {canonical(pin) for pin in pins} == set()
    assert [pin for pin in pins if pin.startswith(("nvidia", "cuda", "triton"))] == []


def required_extras() -> list[tuple[str, str, str]]:
    """Return (file, module, extra) of every ``require("module", "extra")`` in the package."""
    found = []
    for path, text in ((path, path.read_text(encoding="utf-8")) for path in SOURCES):
        for node in ast.walk(ast.parse(text)) if "require" in text else ():
            match node:
                case ast.Call(
                    func=ast.Name("require") | ast.Attribute(attr="require"),
                    args=[ast.Constant(str(module)), ast.Constant(str(extra))],
                ):
                    found.append((str(path.relative_to(ROOT)), module, extra))
    return found


DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow", "huggingface_hub": "huggingface-hub"}


@pytest.mark.parametrize(("file", "module", "extra"), required_extras())
def test_the_extra_named_in_an_error_brings_the_module(file: str, module: str, extra: str) -> None:
    top = module.split(".", maxsplit=1)[0]
    assert extra in EXTRAS, f"{file} names the extra {extra}"
    assert DISTRIBUTIONS.get(top, top) in expand(extra), f"{file}: tenfold[{extra}] does not bring {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_is_one_thought(path: Path) -> None:
    assert path.stem not in {"utils", "helpers", "misc", "common", "manager", "engine"}
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
