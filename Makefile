# Each target sets up .venv by itself; nothing is installed again until pyproject.toml or constraints.txt changes.
PYTHON ?= python3
BIN := .venv/bin
# What the newest and the oldest versions are tested with; another one where an index has builds for CUDA only, say.
NEWEST_TORCH ?= torch
OLDEST_TORCH ?= $(shell $(PYTHON) -m tests.support.floors | grep '^torch==')
# What pip says goes to a file, which is shown where it fails.
PIP_SAID := > .venv/pip.log 2>&1 || { cat .venv/pip.log >&2; exit 1; }
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)

# One worker more than there are cores: some tests wait for processes they started.
WORKERS := $(shell $(PYTHON) -c 'import os; print(os.cpu_count() + 1)')
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal
SHARD ?= 1/1

.PHONY: quickstart test test-all test-slow test-newest test-oldest test-frameworks mutants coverage gpu docs

# On public text: what earlier runs spent on it, which its folder remembers, may be forgotten.
quickstart: .venv/installed
	@rm -rf runs/quickstart
	@HF_HUB_OFFLINE=1 $(BIN)/dp-flash train quickstart

test: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(PYTEST)

# First `make test`, then the documentation, and then the tests that `make test` leaves out: those marked `complete`, and every
# architecture of Transformers, or with SHARD=1/4 every fourth of them from the first on.
test-all: test docs
	$(PYTEST) -m 'complete or coverage' --coverage-shard=$(SHARD)

# About an hour: kill storms, memory as it is measured, every configuration of every kernel, clusters. One at a time, for they measure.
test-slow: .venv/installed-dev
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -m slow

# The fast tests and an eighth of the architectures, in .venv-newest without constraints.txt: what a plain `pip install` brings;
# and in .venv-oldest with the oldest versions that pyproject.toml allows. Remove these folders to install anew.
test-newest test-oldest: test-%: .venv-%/installed
	.venv-$*/bin/dp-flash doctor
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-$*/bin/pytest -n $(WORKERS) --dist worksteal
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-$*/bin/pytest -n $(WORKERS) --dist worksteal -m coverage --coverage-shard=1/8

# Frameworks on top of Transformers, each in .venv-frameworks/NAME as tests/frameworks/NAME.txt says, and what NAME-no-deps.txt
# lists without what that asks for; writes docs/frameworks.md. FRAMEWORKS="setfit trl" are some of them.
FRAMEWORKS ?= $(filter-out %-no-deps,$(basename $(notdir $(wildcard tests/frameworks/*.txt))))
test-frameworks: $(FRAMEWORKS:%=.venv-frameworks/%/installed)
	@failed=; for name in $(FRAMEWORKS); do HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-frameworks/$$name/bin/pytest -m frameworks \
		tests/frameworks/test_$$name.py --frameworks-rows=build/frameworks/$$name.json || failed="$$failed $$name"; done; \
		$(PYTHON) -m tests.support.frameworks_table build/frameworks; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

# Half an hour: faults planted in the privacy core, each of which a test has to find. With FAULTS=training/dp_sgd.py those of a
# file, with FAULTS="--sample 20" so many of one.
mutants: .venv/installed-dev
	$(BIN)/python -m tests.support.mutants $(FAULTS)

# Every architecture of Transformers, exact or refused; writes docs/coverage.md.
coverage: .venv/installed-dev
	$(PYTEST) -m coverage --coverage-table=docs/coverage.md

# Everything that only a GPU shows, in under nine minutes; writes docs/benchmarks_gpu.md. Without make, or in an environment that
# has torch, triton and the packages of pyproject.toml already: python -m tests.gpu
gpu: .venv/installed-dev
	$(BIN)/python -m tests.gpu

# The documentation in build/docs/index.html; any warning is an error. Nothing is downloaded while it is built or read.
docs: .venv/installed-docs
	HF_HUB_OFFLINE=1 $(BIN)/python -m sphinx --fresh-env --fail-on-warning --keep-going --quiet docs build/docs

# torch comes first and by itself: it is the largest, and which build of it is found (CPU, CUDA) is up to pip's configuration.
.venv/installed: pyproject.toml constraints.txt
	@echo "Making .venv, and installing $(TORCH) in it: the largest download ..."
	@$(PYTHON) -m venv .venv
	@$(INSTALL) $(TORCH) $(PIP_SAID)
	@echo "Installing dp-flash-hf and what else it needs ..."
	@$(INSTALL) --editable . $(PIP_SAID)
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "Installing what the tests need ..."
	@$(INSTALL) --editable '.[dev]' $(PIP_SAID)
	@touch $@

.venv/installed-docs: .venv/installed
	@echo "Installing what builds the documentation ..."
	@$(INSTALL) --editable '.[docs]' $(PIP_SAID)
	@touch $@

.venv-newest/installed .venv-oldest/installed: .venv-%/installed: pyproject.toml
	@echo "Making .venv-$* ..."
	@$(PYTHON) -m venv .venv-$*
	@test $* = newest || $(PYTHON) -m tests.support.floors | grep -v '^torch==' > .venv-$*/constraints.txt
	@test $* = oldest || : > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install --quiet $(if $(filter newest,$*),$(NEWEST_TORCH),$(OLDEST_TORCH))
	.venv-$*/bin/python -m pip install --quiet --constraint .venv-$*/constraints.txt --editable '.[dev]'
	@touch $@

.venv-frameworks/%/installed: tests/frameworks/%.txt pyproject.toml
	@echo "Making .venv-frameworks/$* ..."
	@$(PYTHON) -m venv .venv-frameworks/$*
	@install() { .venv-frameworks/$*/bin/python -m pip install --disable-pip-version-check --quiet "$$@" \
		> .venv-frameworks/$*/pip.log 2>&1 || { cat .venv-frameworks/$*/pip.log >&2; exit 1; }; }; \
		others=tests/frameworks/$*-no-deps.txt; \
		install $(TORCH); \
		install --editable . --requirement $< pytest pytest-timeout; \
		test ! -e $$others || install --no-deps --requirement $$others
	@touch $@
