# The project's verbs. Everything is installed into .venv, with the tested versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CLIENTS := .venv-clients
PROFILES ?= profiles
MINUTES ?= 60
export HF_HUB_OFFLINE ?= 0
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help install dev serve profiles test test-clients fuzz lint format types docs examples check-examples bench demo clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(VENV)/.runtime: Makefile pyproject.toml constraints.txt $(wildcard steering_vectors/runtime/cpu/csrc/*.?pp)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[schema]"
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

install: $(VENV)/.runtime  ## Install what serving needs into .venv

dev: $(VENV)/.dev  ## Install what tests, lint and benchmarks need besides

serve: $(VENV)/.runtime profiles  ## Serve the demo model on 127.0.0.1:8000, with its profiles
	exec $(BIN)/trimtab serve --profiles $(PROFILES)

profiles: $(VENV)/.runtime  ## Fit the demo profiles that are missing
	$(BIN)/python scripts/demo_profiles.py --out $(PROFILES)

test: export HF_HUB_OFFLINE := 1
test: lint types $(VENV)/.dev  ## Lint, type-check and run the tests
	$(BIN)/pytest -n auto --dist worksteal

$(CLIENTS)/.installed: pyproject.toml constraints.txt tests/clients/requirements.txt tests/clients/node/package-lock.json
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -r tests/clients/requirements.txt -e ".[schema]"
	if command -v npm >/dev/null; then npm ci --silent --no-audit --no-fund --prefix tests/clients/node; fi
	@touch $@

test-clients: $(CLIENTS)/.installed  ## Run other people's clients against a live server
	$(CLIENTS)/bin/python -m pytest tests/clients

fuzz: export HF_HUB_OFFLINE := 1
fuzz: $(CLIENTS)/.installed  ## Send made-up requests to a live server for MINUTES (60)
	$(CLIENTS)/bin/python -m tests.clients.fuzz --minutes $(MINUTES)

lint: $(VENV)/.dev  ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev  ## Check types, strictly
	$(BIN)/mypy

format: $(VENV)/.dev  ## Rewrite the code in the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev  ## Write docs/api.md from the server's routes, and docs/cli.md from the commands
	$(BIN)/python scripts/api_docs.py
	$(BIN)/python scripts/cli_docs.py

examples: $(VENV)/.dev  ## Write the README's example replies (fits a profile: minutes)
	$(BIN)/python scripts/readme_examples.py

check-examples: export HF_HUB_OFFLINE := 1
check-examples: $(VENV)/.dev  ## Check the README's example replies (the same minutes)
	$(BIN)/python scripts/readme_examples.py --check

bench: $(VENV)/.dev profiles  ## Measure what steering does on the demo model
	$(BIN)/python -m benchmarks.quality.dose_response

demo: $(VENV)/.dev  ## Train the embedded demo model again (about an hour)
	$(BIN)/python examples/train_demo_model.py

clean:  ## Remove what was installed and built
	rm -rf $(VENV) $(CLIENTS) tests/clients/node/node_modules build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
