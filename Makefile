# make demo      installs everything into $(VENV) and trains on the handwritten digits, without and with teleportation
# make test      installs everything into $(VENV) and tests this checkout, of the largest grids of cases a part
# make test-all  the same with all cases: what .ci/run calls
#
# PYTHON  the interpreter that makes the environment, 3.10 or newer
# TORCH   what pip installs as torch, options included: TORCH="torch==2.13.0". Read when the environment is made.
# TEST_PROCESSES  how many processes share the tests, one thread each; 0 is none but pytest's own
# DEMO_ARGS, TEST_ARGS, BENCH_ARGS  are handed on to the command of the target
#
# The environment variables of the build (README, "What the build decides") are read when the package is installed:
# once, and again when a source of the build has changed.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch
TEST_PROCESSES ?= 2
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=

IN_VENV := $(VENV)/bin/python

# A test goes to the process that is free first: a few of them take as long as whole files of others.
PYTEST := OMP_NUM_THREADS=1 $(IN_VENV) -m pytest --numprocesses $(TEST_PROCESSES) --dist worksteal

.PHONY: demo test test-all lint bench install info clean

demo: install
	$(IN_VENV) -m symtele_cuda demo $(DEMO_ARGS)

test: install
	$(PYTEST) -m "not exhaustive" $(TEST_ARGS)

test-all: install
	$(PYTEST) $(TEST_ARGS)

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
$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py build_decision.py $(wildcard csrc/*)
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
