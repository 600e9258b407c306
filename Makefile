# Wraps the plain pip and python commands of README.md; nothing happens here that is not shown there.
#
#   make demo    install, then run the whole chain on the built-in model
#   make test    install what the tests need, then run them
#   make room    ROOM=train: one room's tests and doctests, without those that start processes; under a minute
#   make slow    the tests that take long: fifty kills, hundreds of flipped bits
#   make lowest  the tests nearest to the libraries, on the oldest versions that pyproject.toml accepts; torch is that of
#                constraints.txt, since the oldest comes with 8 GB of CUDA: TORCH=exact takes it
#   make labels  the labels of Python source, on a Python of any version: make labels PYTHON=python3.13 LABELS=/tmp/labels
#   make lint    ruff, check and format
#   make types   mypy
#   make docs    the pages of docs/ as a site in site/; a warning is an error
#
# VENV and PYTHON can be set: make test VENV=/tmp/env PYTHON=python3.11

PYTHON ?= python3
VENV ?= .venv
LOWEST ?= .venv-lowest
LABELS ?= .venv-labels
OUT ?= demo-out
ROOM ?= store
SITE ?= site
PYTEST_ARGS ?=

BIN := $(VENV)/bin
LOWEST_TESTS := tests/store/test_store.py tests/store/test_xarray.py tests/store/test_bucket.py tests/text tests/models tests/sae \
	tests/statistics tests/structure tests/stores tests/evaluate tests/exchange tests/report tests/commands/test_cli.py
SOURCES := actstore pipelines benchmarks tests docs cli.py

.PHONY: demo test room slow lowest labels lint types docs clean
.NOTPARALLEL:

demo: $(VENV)/.installed
	$(BIN)/python cli.py demo --out $(OUT)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

room: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not slow and not network and not processes and not cluster" \
		$(wildcard tests/$(ROOM) pipelines/$(ROOM) pipelines/$(ROOM).py) $(if $(filter store,$(ROOM)),actstore) $(PYTEST_ARGS)

slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow -s $(PYTEST_ARGS)

lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pip check
	$(LOWEST)/bin/python -m pytest -n 2 --dist loadfile $(wildcard $(LOWEST_TESTS)) $(PYTEST_ARGS)

labels:
	$(PYTHON) -m venv --clear $(LABELS)
	$(LABELS)/bin/python -m pip install --quiet numpy pytest
	$(LABELS)/bin/python -m pytest -q --noconftest -o addopts= \
		tests/concepts/test_python_labels.py tests/concepts/test_python_tokens.py

lint: $(VENV)/.installed-dev
	$(BIN)/python -m ruff check $(SOURCES)
	$(BIN)/python -m ruff format --check $(SOURCES)

types: $(VENV)/.installed-dev
	$(BIN)/python -m mypy

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --site-dir $(abspath $(SITE))

clean:
	rm -rf $(VENV) $(LOWEST) $(LABELS) build site actstore.egg-info

# A stamp in the environment says what was installed from which pyproject.toml and constraints.txt.
$(VENV)/.installed: EXTRA =
$(VENV)/.installed-test: EXTRA = [test]
$(VENV)/.installed-docs: EXTRA = [docs]
$(VENV)/.installed-dev: EXTRA = [dev]
$(VENV)/.installed $(VENV)/.installed-test $(VENV)/.installed-docs $(VENV)/.installed-dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".$(EXTRA)"
	touch $@

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	grep -vE '^(torch|triton|nvidia-)' constraints-lowest.txt > $(LOWEST)/pins.txt
	$(LOWEST)/bin/python -m pip install --quiet --no-deps -r $(LOWEST)/pins.txt -e .
	$(LOWEST)/bin/python -m pip install --quiet $(if $(filter exact,$(TORCH)),-r constraints-lowest.txt,$(shell grep '^torch==' constraints.txt))
	touch $@
