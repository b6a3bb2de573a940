# `make demo` and `make test` need Python >= 3.11 and nothing else: they set up .venv themselves, once.
#
#   PYTHON=python3.12      the interpreter to build .venv with (default: 3.11, the tested one, or else what is there)
#   PIP_ARGS="..."         more arguments for pip, as --extra-index-url https://download.pytorch.org/whl/cpu,
#                          which spares Linux machines without an NVIDIA GPU the CUDA libraries
#   PYTEST_ARGS="..."      more arguments for pytest, as -k tucker2

SHELL := /bin/bash
# An announcement of its makers, not a defect of the docs.
export NO_MKDOCS_2_WARNING := 1
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?=
PYTHONS := python3.11 python3 python3.12 python3.13 python
PIP_ARGS ?=
PYTEST_ARGS ?=
# One thread per process: the tests are many and small, and run one process per core.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt

.PHONY: help demo test lint docs format setup clean
.DELETE_ON_ERROR:

help: ## what there is to make
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

demo: $(VENV)/.demo ## train a small network, compress it, show before and after
	@$(BIN)/tenfold demo

test: $(VENV)/.dev ## all tests: package, doctests, snippets of the docs, examples
	@$(ONE_THREAD) $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal $(PYTEST_ARGS)

# mkdocs without --quiet: quiet, it counts no warnings, and --strict has nothing to fail on.
lint: $(VENV)/.dev ## style, types, the direction of imports, docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/mkdocs build --strict

docs: $(VENV)/.dev ## the site, in site/
	$(BIN)/mkdocs build --strict

format: $(VENV)/.dev ## let ruff repair and format what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/.dev ## .venv with everything that development needs

# The stamps are older than what they depend on when dependencies change: then pip runs again.
$(VENV)/.demo: pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { $(find_python); "$$python" -m venv --clear $(VENV); }
	@echo "Installing tenfold into $(VENV) (once, some minutes) ..."
	@$(INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "Installing the development tools into $(VENV) (once, some minutes) ..."
	@$(INSTALL) -e '.[dev]'
	@touch $@

# Sets $python to the first interpreter that is new enough and can make virtual environments, or says what is missing.
define find_python
python=""; \
for name in $(or $(PYTHON),$(PYTHONS)); do \
	if "$$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
		python="$$name"; break; \
	fi; \
done; \
if [ -z "$$python" ]; then \
	echo "tenfold needs Python 3.11 or newer with venv and pip; tried: $(or $(PYTHON),$(PYTHONS))." >&2; \
	echo "Install it (Debian, Ubuntu: apt-get install python3 python3-venv), or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; \
	exit 1; \
fi; \
echo "Using $$("$$python" --version) for $(VENV)"
endef

clean: ## remove everything that was built, .venv included
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .mypy_cache .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
