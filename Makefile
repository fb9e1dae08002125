# make demo   set up and run the whole pipeline on a synthetic world (ARGS="demo.seed=1 run=runs/demo-1" to vary it)
# make clip   train the small CLIP that ships with the package again, into runs/demo-clip; resumes (ARGS="--minutes 120")
# make backbones   train the backbones of the world's networks and MCTformer, into runs/demo-backbones
# make check  unit tests and lint, for every change
# make test   all tests: several ranks, and a real Slurm where it is installed
# make lint   ruff, mypy, import-linter, and hadolint on the Dockerfile
# make bench-gpu  measure training steps on one GPU in eight minutes, into runs/bench-gpu.json
# make image  the container image, by Docker or Podman (IMAGE=name; ARGS="--build-arg BASE=..." as the Dockerfile says)

VENV ?= .venv
PYTHON ?= python3
READY = $(VENV)/ready
IMAGE ?= weakclip
ENGINE = $(or $(shell command -v docker || command -v podman),$(error neither docker nor podman is installed))

unexport PYTHONDONTWRITEBYTECODE  # hundreds of processes import the same modules

.PHONY: demo clip backbones check test lint bench-gpu image

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: $(READY)
	$(VENV)/bin/python -m weakclip.demo --config configs/demo.yaml $(ARGS)

clip: $(READY)
	test -f runs/demo-annotator.safetensors || $(VENV)/bin/python -m weakclip.demo.annotator --out runs/demo-annotator.safetensors
	$(VENV)/bin/python -m weakclip.demo.clip --out runs/demo-clip $(ARGS)

backbones: $(READY)
	$(VENV)/bin/python -m weakclip.demo.backbones --out runs/demo-backbones $(ARGS)

check: lint
	$(VENV)/bin/python -m pytest -n auto --dist loadscope tests/unit $(ARGS)

test: $(READY)
	$(VENV)/bin/python -m pytest -n auto --dist loadscope --no-loadscope-reorder $(ARGS)  # the slow ones, in tests/integration, come first

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/hadolint Dockerfile

bench-gpu: $(READY)
	$(VENV)/bin/python benchmarks/gpu.py $(ARGS)

image:
	$(ENGINE) build --tag $(IMAGE) $(ARGS) .
