# The two commands a user needs: `make cluster` and `make test`. See README.md.
SHELL := /bin/bash
PYTHON ?= /usr/bin/python3
VENV := .venv
PG_MAJORS ?= $(notdir $(wildcard /usr/lib/postgresql/*))
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export NEON_LIB_DIR := $(CURDIR)/build/lib

.DEFAULT_GOAL := help

help: ## Show this text
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --require-hashes -r requirements.lock
	$(VENV)/bin/pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

venv: $(VENV)/.ready ## Make the virtual environment in this clone

ext: ## Compile the Postgres libraries for every installed Postgres major
	@for major in $(PG_MAJORS); do \
	  if [ -x /usr/lib/postgresql/$$major/bin/pg_config ]; then \
	    $(MAKE) --no-print-directory -C postgres_ext PG_CONFIG=/usr/lib/postgresql/$$major/bin/pg_config OUT=$(CURDIR)/build/lib/pg$$major || exit 1; \
	  fi; done

lint: venv ## Check style and types
	ruff check neon_services tests
	ruff format --check neon_services tests
	mypy

-include lab.mk
.PHONY: help venv ext lint
