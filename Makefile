# Two commands do everything: `make demo` and `make test`. Each installs what is missing into .venv first.
PYTHON ?= python3
# cuda where an NVIDIA driver answers, cpu elsewhere; `make DEVICE=cpu demo` overrides it.
DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(DEVICE)
TORCH := 2.13.0
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar off

export PYTHONUNBUFFERED := 1
# Local copies of hub data sets, if there are any beside the checkout (see README, "Your own data").
ifneq ($(wildcard ../shared/data),)
export RATCHET_DATA ?= $(abspath ../shared/data)
endif

.PHONY: demo test test-slow check format docs bench peers ui clean install lock

demo: $(READY)
	$(BIN)/ratchet run deployments/presets/rest_em/tiny.yaml

test: $(READY)
	$(BIN)/pytest -m "not slow"

test-slow: $(READY)
	$(BIN)/pytest -m slow --timeout 5400

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY)
	$(BIN)/python -m docs.generate

# What benchmarks compare with goes beside the environment, not into it: the tests never see it.
peers: $(READY)
	$(PIP) --no-deps --upgrade --target .peers -r benchmarks/peers.txt

bench: $(READY)
	for script in benchmarks/bench_*.py; do $(BIN)/python "$$script" || exit 1; done

ui: $(READY)
	$(BIN)/ratchet ui --worker

install: $(READY)

# Plain `torch` is the CUDA build on most indexes, several GB of it. An index or wheel folder that has the CPU build
# under its own version is asked first; elsewhere uv knows where PyTorch keeps its CPU builds.
$(VENV)/.torch-cpu: | $(VENV)
	$(PIP) --no-deps "torch==$(TORCH)+cpu" 2>/dev/null || \
	  { $(PIP) uv && $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --torch-backend cpu "torch==$(TORCH)"; }
	touch $@

$(VENV)/.torch-cuda: | $(VENV)
	$(PIP) "torch==$(TORCH)"
	touch $@

$(VENV):
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; say make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# The lock names every package there is, so nothing is resolved: --no-deps installs exactly it.
$(READY): requirements/$(DEVICE).lock pyproject.toml $(VENV)/.torch-$(DEVICE)
	$(PIP) --no-deps -r requirements/$(DEVICE).lock
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@

# Torch and what only its CUDA build needs stay out of the CPU lock: torch has a rule of its own above.
lock: $(READY)
	$(PIP) uv
	for device in cpu cuda; do $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header \
	  --override requirements/$$device.override \
	  requirements/$$device.in | grep -v "== 'never'" >requirements/$$device.lock; done
	sed -i -E '/^(torch|triton|nvidia-|cuda-)/d' requirements/cpu.lock

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
