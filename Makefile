# Two commands matter: `make demo` and `make test`. Both need python3 (3.10 to 3.12) and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out
STUDY ?=
BENCH ?=
WORKERS ?= 2

.PHONY: demo test lint serve bench clean

demo: $(VENV)/.serve  ## boot the embedded Triton and analyse one study: STUDY=path, by default a phantom
ifeq ($(strip $(STUDY)),)
	rm -rf $(OUT)/phantom
	$(BIN)/groundglass phantom --slices 60 --lesion 20:40 --out $(OUT)/phantom
	$(BIN)/groundglass analyze $(OUT)/phantom --out $(OUT)/demo
else
	$(BIN)/groundglass analyze "$(STUDY)" --out $(OUT)/demo
endif

test: $(VENV)/.dev $(VENV)/.debian lint  ## static checks and all tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

serve: $(VENV)/.serve  ## keep an embedded Triton running on ports 8000 to 8002
	$(BIN)/groundglass serve

bench: $(VENV)/.bench  ## measure every scenario, about half an hour on two cores: report in benchmarks/results; BENCH=--quick for a smoke test
	$(BIN)/groundglass bench $(BENCH)

# The balancer and the metrics server that the deployment uses, as Debian builds them. Where they can't be had, their tests
# say so: they are skipped, and fail under CI.
$(VENV)/.debian: tests/fetch_debian_servers.sh | $(VENV)/bin/python
	tests/fetch_debian_servers.sh $(VENV)/debian haproxy prometheus && touch $@ || echo "no HAProxy or no Prometheus" >&2

clean:
	rm -rf $(VENV) $(OUT)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12) and "python3 is %d.%d; Groundglass needs 3.10 to 3.12: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

# constraints.txt pins what was tested. A stamp file says which extras are in the environment.
$(VENV)/.serve: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[serve]'
	@touch $@

$(VENV)/.bench: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[serve,export,bench]'
	@touch $@ $(VENV)/.serve

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.serve $(VENV)/.bench
