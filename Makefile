# make demo   set up and run the whole pipeline on a synthetic world (ARGS="demo.seed=1 run=runs/demo-1" to vary it)
# make test   set up and run the tests
# make lint   ruff and mypy

VENV ?= .venv
PYTHON ?= python3
READY = $(VENV)/ready

.PHONY: demo test lint

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: $(READY)
	$(VENV)/bin/python -m weakclip.demo --config configs/demo.yaml $(ARGS)

test: $(READY)
	$(VENV)/bin/python -m pytest -n auto --dist loadscope --no-loadscope-reorder $(ARGS)  # the slow ones, in tests/integration, come first

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
