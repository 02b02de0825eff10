# prefixd: `make` alone explains the targets.
SHELL    := /bin/bash
PYTHON   ?= python3
HOST     ?= 127.0.0.1
PORT     ?= 8000
ADMIN_PORT ?= 8001
BACKBONE ?= demo
# Of its own: a prefix fits one backbone, and both have a task e2e.
REGISTRY ?= var/registry$(if $(filter smollm2,$(BACKBONE)),-smollm2)
TRAINER_PORT ?= 8100
TRAINER_ADMIN_PORT ?= 8101
TRAINER_DATA ?= var/trainer
VENV     := .venv
BIN      := $(VENV)/bin
PEERS    := .peers
# Two workers, one file to a worker: tests of a file share their fixtures (a server process, a backbone).
PYTEST   ?= -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install serve trainer test test-slow test-faults lint format bench bench-peers docker-test clean

help: ## Show this help
	@awk 'BEGIN {FS = ":.*## "; print "usage: make TARGET [PORT=8000]\n"} \
	  /^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## Make .venv with the pinned dependencies; the command is .venv/bin/prefixd

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "prefixd needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

serve: install ## Serve the demo on http://HOST:PORT (disk registry in var/, bundled GPT-2; BACKBONE=smollm2 fetches 93 MB)
	$(if $(filter smollm2,$(BACKBONE)),$(BIN)/prefixd backbones fetch smollm2)
	$(BIN)/prefixd serve --host $(HOST) --port $(PORT) --admin-port $(ADMIN_PORT) --backbone $(BACKBONE) \
	  --registry $(REGISTRY)

trainer: install ## Take training jobs on http://HOST:8100 (TRAINER_PORT), for the demo's backbones and the same registry
	$(BIN)/prefixd trainer --host $(HOST) --port $(TRAINER_PORT) --admin-port $(TRAINER_ADMIN_PORT) \
	  --data $(TRAINER_DATA) --registry $(REGISTRY) $(if $(filter smollm2,$(BACKBONE)),--backbone smollm2)

test: lint ## Run linters, types and the test suite
	$(BIN)/python -m pytest $(PYTEST) -m "not slow and not faults"

test-slow: install ## Run the slower tier of tests
	$(BIN)/python -m pytest $(PYTEST) -m "slow and not faults"

test-faults: install ## Run the campaign of faults against real processes (under 10 minutes on 2 cores)
	$(BIN)/python -m pytest $(PYTEST) -vv -m faults

lint: install ## Check style (ruff) and types (mypy --strict)
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install ## Sort imports and apply safe fixes
	$(BIN)/ruff check --fix .

bench-peers: $(PEERS)/ctranslate2/.installed ## Make environments of peers to measure against, which make bench then does

$(PEERS)/ctranslate2/.installed: constraints.txt
	$(PYTHON) -m venv $(PEERS)/ctranslate2
	$(PEERS)/ctranslate2/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  ctranslate2==4.8.5 torch transformers
	@touch $@

bench: install ## Measure serving speed against transformers and PEFT (10 to 30 minutes on 2 cores; quiet machine)
	$(BIN)/python -m benchmarks.serve

docker-test: ## Build the images, compose the services, kill servers and trainers at work (Docker, else Podman as root)
	$(PYTHON) -m tests.docker

clean: ## Remove caches and environments (var/, your registry, stays)
	rm -rf $(VENV) $(PEERS) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
