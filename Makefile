# The two commands a user needs: `make cluster` and `make test`. See README.md.
SHELL := /bin/bash
PYTHON ?= /usr/bin/python3
VENV := .venv
# How long real safekeepers are tortured in the test run.
TORTURE_SECONDS ?= 600
PG_MAJORS ?= $(notdir $(wildcard /usr/lib/postgresql/*))
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export NEON_LIB_DIR := $(CURDIR)/build/lib
export PYTHONDONTWRITEBYTECODE := 1

.DEFAULT_GOAL := help

help: ## Show this text
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.ready: requirements.lock pyproject.toml
	@tools/install-packages venv
	@echo "making the virtual environment $(VENV) from requirements.lock"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

venv: $(VENV)/.ready ## Make the virtual environment in this clone

packages:
	@tools/install-packages venv build test lab

ext: ## Compile the Postgres libraries for every installed Postgres major
	@for major in $(PG_MAJORS); do \
	  if [ -x /usr/lib/postgresql/$$major/bin/pg_config ] && [ -d /usr/include/postgresql/$$major/server ]; then \
	    $(MAKE) --no-print-directory -C postgres_ext PG_CONFIG=/usr/lib/postgresql/$$major/bin/pg_config OUT=$(CURDIR)/build/lib/pg$$major || exit 1; \
	  fi; done

lint: venv ## Check style, types and playbooks
	ruff check neon_services tests lab library module_utils
	ruff format --check neon_services tests lab library module_utils
	mypy
	ansible-lint --offline --strict

test: packages ## Install what the tests need and run them all
	@setpriv --reuid nobody --regid nogroup --clear-groups test -r $(CURDIR)/Makefile || { \
	  echo "error: $(CURDIR) is in a directory that other users may not enter, and tests run Postgres as the user postgres:" \
	    "clone the repository elsewhere, for example below /srv" >&2; exit 2; }
	@$(MAKE) --no-print-directory venv
	@$(MAKE) --no-print-directory ext
	@$(MAKE) --no-print-directory lint
	NEON_TORTURE_SECONDS=$(TORTURE_SECONDS) pytest -q --durations=15 tests
	@$(MAKE) --no-print-directory molecule

bench: venv ext ## Print the performance table as ratios (takes minutes; needs a quiet machine)
	python -m tests.benchmarks

simulate: venv ## Run SEEDS schedules of the consensus simulation (SEEDS=20000)
	python -m neon_services.simulation --schedules $(or $(SEEDS),20000) --first $(or $(FIRST),0)

mutations: venv ## Find every planted bug by simulation and write docs/mutations.md
	python -m tests.simulation.table

-include lab.mk
.PHONY: help venv packages ext lint test bench simulate mutations
