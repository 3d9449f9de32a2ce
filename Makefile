# make demo   one network in PyTorch, Keras and Flax: native layers drift apart, normkit's do not
# make test   every test, on every backend
# make check  lint, and the types of the core
# make setup  nothing but ./.venv
# Each makes ./.venv first, if it is not there or no longer fits.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest -q -n 2
export TF_CPP_MIN_LOG_LEVEL ?= 3
export JAX_PLATFORMS ?= cpu

.PHONY: setup demo test check clean

setup: $(READY)

demo: $(READY)
	@echo "== Training the digits network in PyTorch, Keras and Flax"
	$(BIN)/python docs/examples/digits.py

test: $(READY)
	@echo "== Most of an hour on two cores. Keras on JAX and on PyTorch (Keras on TensorFlow runs with the rest)"
	KERAS_BACKEND=jax $(PYTEST) tests/test_keras*.py
	KERAS_BACKEND=torch $(PYTEST) tests/test_keras*.py
	@echo "== All tests, on all backends"
	KERAS_BACKEND=tensorflow NORMKIT_TEST_BACKENDS=all $(PYTEST)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy normkit

$(READY): pyproject.toml requirements-dev.txt constraints.txt
	@echo "== Setting up $(VENV): PyTorch, TensorFlow, JAX and the test tools (a minute or two)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements-dev.txt
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
