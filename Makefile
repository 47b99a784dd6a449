# Every target works in a fresh clone: `setup` comes first by itself.
#
#   PYTHON=python3.12   another interpreter, Python >= 3.11
#   TORCH=system        the torch that PYTHON already has (GPU images); otherwise the one of constraints.txt
#   VENV=folder         another place for the environment
#   SCALE=long          a longer demo, with a result of its own
#   DATA=folder         the OpenKBP collection, for `make openkbp`, `make study` (SCALE=gpu, SEED=1) and `make gpu`
#   ONLY="nms atss"     some of the benchmarks, for `make bench`
#   WANDB=offline       the runs of demo, openkbp, study and detr log to W&B, too; or online
#
# pip reads its own settings: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu takes the small torch without CUDA.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= own
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed-$(TORCH)
WORKERS ?= 2
SYSTEM_SITES = import sys, sysconfig; print(sysconfig.get_path("purelib")) if sys.prefix != sys.base_prefix else None

BENCHMARKS = $(if $(ONLY),$(ONLY:%=benchmarks/%.py),$(filter-out %/harness.py,$(wildcard benchmarks/*.py)))

.PHONY: help setup demo test test-all check format openkbp study detr data-named bench gpu clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## the environment in .venv, once

# An environment made with the other TORCH is made anew: its torch would hide the one asked for.
$(STAMP): pyproject.toml constraints.txt setup.py
	@case "$(TORCH)" in own|system) ;; *) echo "TORCH=$(TORCH) is unknown: leave it out, or TORCH=system" >&2; exit 2;; esac
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "pretrain3d needs Python >= 3.11, $(PYTHON) is $$($(PYTHON) --version 2>&1); name another: make PYTHON=python3.12" >&2; exit 2; }
ifeq ($(TORCH),system)
	@$(PYTHON) -c 'from importlib.metadata import version; version("torch")' 2>/dev/null || { \
	  echo "TORCH=system: $(PYTHON) has no torch; leave TORCH=system out, or name the interpreter that has it: make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv --system-site-packages $(if $(wildcard $(VENV)/.installed-own),--clear) $(VENV)
	@# An interpreter that is itself an environment: --system-site-packages would pass it over.
	@$(PYTHON) -c '$(SYSTEM_SITES)' > $$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/system.pth
	@$(PYTHON) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/constraints.txt
	$(PY) -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[dev]'
else
	$(PYTHON) -m venv $(if $(wildcard $(VENV)/.installed-system),--clear) $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
endif
	@touch $@

demo: setup  ## the whole way on embedded data: table and report in runs/demo
	$(PY) experiments/run.py experiments/demo.yaml $(if $(SCALE),scale=$(SCALE)) $(if $(WANDB),wandb=$(WANDB))

openkbp: data-named setup  ## the same on real CTs: make openkbp DATA=<folder>
	$(PY) experiments/run.py experiments/openkbp.yaml data="$(DATA)" $(if $(WANDB),wandb=$(WANDB))

study: data-named setup  ## every pretraining method, and a detector from each, on real CTs: make study DATA=<folder>
	$(PY) experiments/run.py experiments/study.yaml data="$(DATA)" $(if $(SCALE),scale=$(SCALE)) $(if $(SEED),seed=$(SEED)) \
	  $(if $(WANDB),wandb=$(WANDB))

detr: setup  ## Deformable DETR on the data of the long demo
	$(PY) experiments/run.py experiments/detr.yaml $(if $(WANDB),wandb=$(WANDB))

data-named:
	@test -n "$(DATA)" || { echo "make $(MAKECMDGOALS) needs DATA=<folder of the OpenKBP collection>" >&2; exit 2; }

test: setup  ## the fast tests
	$(PY) -m pytest -m "not slow" -n $(WORKERS) --dist loadfile

# Files in their order: the longest ones do not come last, beside nothing.
test-all: setup  ## all tests, slow ones too
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

check: setup  ## style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: setup  ## rewrite the files in the project's style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: setup  ## measure what the project promises; fails below a target
	@ls $(BENCHMARKS) >/dev/null || exit 2; reached= missed= not_run=; for file in $(BENCHMARKS); do \
	  name=$$(basename $$file .py); echo; echo "$(PY) $$file"; $(PY) $$file; \
	  case $$? in 0) reached="$$reached $$name";; 2) not_run="$$not_run $$name";; *) missed="$$missed $$name";; esac; \
	done; echo; echo "reached:          $${reached:- none}"; echo "missed or failed: $${missed:- none}"; \
	echo "not run:          $${not_run:- none}"; test -z "$$missed"

gpu: data-named setup  ## what only a GPU can show: tests, the study, benchmarks: make gpu DATA=<folder>
	@$(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "make gpu: torch sees no GPU" >&2; exit 2; }
	$(PY) -m pytest tests/test_gpu.py tests/test_planning_memory.py
	$(MAKE) study SCALE=gpu
	$(MAKE) bench ONLY="step augment retinanet pretrain_cost"

clean:  ## remove environment, caches and builds; data/ and runs/ stay
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
	find src tests experiments benchmarks -name __pycache__ -prune -exec rm -rf {} +
