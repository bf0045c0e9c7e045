# Two commands for everybody: make demo, make test. Everything else is listed by make help.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
.DEFAULT_GOAL := help

help:            ## this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps lavlab-shell==0.9.1  # its weights only
	touch $@

env: $(VENV)/.ready ## the environment, from pinned versions

demo: env        ## a real head MRI through queue, admission, Ray and MLflow to a DICOM SEG
	$(BIN)/permed demo

check: env       ## format, lint, types, import rules: seconds
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: env check  ## every test that needs no special hardware
	$(BIN)/python -m pytest -m "not soak and not gpu"

test-offline: env ## every test that needs no special hardware, in a network of its own: loopback only
	$(BIN)/python -m permed_compute.testing.network -- $(BIN)/python -m pytest -m "not soak and not gpu"

soak: env        ## long runs and chaos
	$(BIN)/python -m pytest -m soak --timeout 3600

bench: env       ## measure ours beside its peers, in one run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/permed bench

real-parts:      ## Debian servers and oracles that tests use (root)
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	    postgresql dicom3tools mricron-data plink2 bcftools orthanc orthanc-dicomweb openssh-server \
	    slurm-wlm munge slurmdbd mariadb-server

.PHONY: help env demo check test test-offline soak bench real-parts
