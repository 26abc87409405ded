# make demo    installs everything into $(VENV) and trains on the handwritten digits, without and with teleportation
# make test    installs everything into $(VENV) and tests this checkout
#
# PYTHON  the interpreter that makes the environment, 3.10 or newer
# TORCH   what pip installs as torch, options included: TORCH="torch==2.13.0". Read when the environment is made.
# DEMO_ARGS, TEST_ARGS, BENCH_ARGS  are handed on to the command of the target
#
# The environment variables of the build (README, "What the build decides") are read when the package is installed:
# once, and again when a source of the build has changed.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=

IN_VENV := $(VENV)/bin/python

.PHONY: demo test lint bench install info clean

demo: install
	$(IN_VENV) -m symtele_cuda demo $(DEMO_ARGS)

test: install
	$(IN_VENV) -m pytest $(TEST_ARGS)

lint: install
	$(IN_VENV) -m ruff check .
	$(IN_VENV) -m mypy

bench: install
	$(IN_VENV) -m bench.layer $(BENCH_ARGS)
	$(IN_VENV) -m bench.teleport $(BENCH_ARGS)

info: install
	$(IN_VENV) -m symtele_cuda info

install: $(VENV)/.installed

clean:
	rm -rf $(VENV) build *.egg-info symtele_cuda/_build.json symtele_cuda/_kernels.so

# The package is installed in editable form, so that every target runs this checkout, and into the environment that
# already holds torch, so that the build sees the torch it will run with.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py symtele_cuda/kernels/build_decision.py $(wildcard csrc/*)
	@echo "installing symtele_cuda and what its tests, demo and experiments need into $(VENV)"
	$(IN_VENV) -m pip install --quiet --no-build-isolation --editable ".[test,demo,experiments]"
	@$(IN_VENV) -m symtele_cuda info
	@touch $@

# The last lines: the packages of [build-system] in pyproject.toml, which pip does not bring without isolation, and, for
# a torch with CUDA, the headers of CUTLASS.
$(VENV)/.torch: $(VENV)/.made
	@echo "installing $(TORCH) into $(VENV); a build with CUDA is a download of several GB"
	$(IN_VENV) -m pip install $(TORCH)
	@$(IN_VENV) -m pip install --quiet "setuptools>=77" ninja
	@if $(IN_VENV) -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; \
	then $(IN_VENV) -m pip install --quiet --no-deps nvidia-cutlass; fi
	@touch $@

# Some systems ship Python without the module `ensurepip`, which venv wants; their own pip can install one just as well.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "symtele_cuda needs Python 3.10 or newer")'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null && $(PYTHON) -m venv $(VENV) || { \
	    $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip install --quiet --target \
	    "$$($(IN_VENV) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" pip; }
	@touch $@
