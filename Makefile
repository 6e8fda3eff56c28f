# `make demo` shows what Holdfast does, `make test` proves it. Both install into .venv what they need.

PYTHON ?= python3
# PyPI's torch for Linux brings gigabytes of CUDA that nothing here uses, so a CPU build is preferred.
# Where this index cannot be reached, PyPI's is taken.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
ARGS ?=

INSTALL := .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt
ASK_INDEX := from urllib.request import urlopen; \
	urlopen("$(TORCH_INDEX)/torch/", timeout=10); print("--extra-index-url $(TORCH_INDEX)")
OLD_PYTHON := "Python 3.11 or later is needed; for example: make PYTHON=python3.12"
SOURCES := $(wildcard engine/*.py engine/*/*.py states/*.py engine/demo/model/*/*)

.PHONY: demo test check docs bench train clean
.DELETE_ON_ERROR:

demo: demo/contents.txt
	@cat $<

demo/contents.txt: .venv/ready $(SOURCES)
	@mkdir -p demo
	.venv/bin/holdfast demo demo > $@

test: .venv/ready-to-test build/namespace/holdfast
	.venv/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

check: .venv/ready-to-test build/namespace/holdfast
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy -p holdfast.states -p holdfast.engine
	.venv/bin/lint-imports --no-logo --no-cache

docs: demo
	cp demo/contact-sheet.png docs/demo.png
	.venv/bin/python docs/typed.py
	.venv/bin/python docs/reference.py

bench: .venv/ready-to-test
	.venv/bin/python -m tests.benchmarks $(ARGS)

train: .venv/ready-to-test
	.venv/bin/python -m holdfast.engine.demo.train $(ARGS)

clean:
	rm -rf .venv build demo dist holdfast.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Where mypy finds the package under its name.
build/namespace/holdfast:
	mkdir -p $@
	ln -sfn ../../../engine $@/engine
	ln -sfn ../../../states $@/states

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and $(OLD_PYTHON))'
	@echo 'Installing Holdfast and what it needs into .venv: once, a few minutes.'
	@$(PYTHON) -m venv .venv
	@$(INSTALL) $$($(PYTHON) -c '$(ASK_INDEX)' 2>/dev/null) torch torchvision
	@$(INSTALL) -e '.[cli]'
	@touch $@

.venv/ready-to-test: .venv/ready
	@echo 'Installing what the tests need into .venv: once, a few minutes.'
	@$(INSTALL) -e '.[dev]'
	@touch $@
