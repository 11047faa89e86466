# The project's commands. `make` alone lists them.
#
#   PYTHON  the interpreter the environment is made from (3.10 or newer)
#   VENV    where the environment lives; an existing one is used and completed
#   MODEL   what `make demo` trains: any model of the timm registry that takes 32-pixel images
#   JOBS    how many tests run beside each other: a process of 2 GB and its children each

PYTHON ?= python3
VENV ?= .venv
MODEL ?= vim_nano_patch4_32
JOBS ?= $(shell $(PYTHON) -c 'import os; print(min(os.cpu_count(), 4))')

BIN := $(VENV)/bin
DEMO_OUT := output/demo/$(MODEL)
# Vim's rate of 5e-3 leaves the DeiT at 17 % top-1; its best of those tried is this.
DEMO_FLAGS_deit_nano_patch4_32 := --lr 1e-3 --warmup-epochs 4
DEMO_RUN = $(BIN)/python vim/main.py --config vim/configs/demo.yaml --model $(MODEL) $(DEMO_FLAGS_$(MODEL))
PACKAGES := causal_conv1d mamba-1p1p1
# An editable install follows its Python files by itself; it must be repeated when these change.
PACKAGE_SOURCES := $(foreach package,$(PACKAGES),\
	$(wildcard $(package)/pyproject.toml $(package)/setup.py $(package)/csrc/*))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo demo-seg demo-det test test-fast test-gpu test-slurm lint bench bench-quick bench-gpu

help: ## list these commands
	@echo "Vision Mamba. Commands (the first one makes $(VENV): about 2 minutes and 6 GB):"
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' Makefile | awk -F'|' '{ printf "%-20s %s\n", $$1, $$2 }'
	@echo "Variables: MODEL=$(MODEL) PYTHON=$(PYTHON) VENV=$(VENV) JOBS=$(JOBS)"

install: $(VENV)/.installed ## make the environment and install the packages into it

demo: $(VENV)/.installed ## train MODEL on scikit-learn's digits, evaluate it, show where the pictures are
	$(DEMO_RUN) --output_dir $(DEMO_OUT)
	$(DEMO_RUN) --eval \
		--resume $(DEMO_OUT)/best_checkpoint.pth --output_dir $(DEMO_OUT)/eval
	@echo
	@echo "Pictures of this run (training curves, confusion matrix, most confident mistakes):"
	@ls $(DEMO_OUT)/*.png
	@echo "The same run for a DeiT of equal width and depth: make demo MODEL=deit_nano_patch4_32"

# Small tensors: with two threads each waits for the other, the longer the busier the machine.
demo-seg demo-det: export OMP_NUM_THREADS = 1

demo-seg: $(VENV)/.installed ## train a segmenter on generated scenes of digits, evaluate it, draw what it sees
	$(BIN)/python seg/train.py --config seg/configs/demo.yaml --output_dir output/demo-seg
	$(BIN)/python seg/train.py --config seg/configs/demo.yaml --eval \
		--resume output/demo-seg/best_checkpoint.pth --output_dir output/demo-seg/eval
	@echo
	@echo "Pictures of this run (held-out scenes with labels and predictions; classes; training curves):"
	@ls output/demo-seg/eval/*.png output/demo-seg/*.png

demo-det: $(VENV)/.installed-det ## train a detector on generated scenes of digits, evaluate it, draw what it finds
	$(BIN)/python det/train.py --config det/configs/demo.yaml --output_dir output/demo-det
	$(BIN)/python det/train.py --config det/configs/demo.yaml --eval \
		--resume output/demo-det/best_checkpoint.pth --output_dir output/demo-det/eval
	@echo
	@echo "Pictures of this run (what was found in held-out scenes, on the left, and the truth; training curves):"
	@ls output/demo-det/eval/*.png output/demo-det/*.png

# One thread for each process: the tests run beside each other, and the program's start processes of their own.
TEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test: $(VENV)/.installed-dev ## all tests that need no GPU
	$(TEST) -m "not gpu"

test-fast: $(VENV)/.installed-dev ## the tests of the edit loop: no slow ones
	$(TEST) -m "not gpu and not slow"

test-gpu: $(VENV)/.installed-dev ## the tests that need a GPU (most of it is compiling: JOBS=16 on 16 processors)
	$(TEST) -m gpu

test-slurm: $(VENV)/.installed-dev ## a run that SLURM stops and requeues; installs Debian's SLURM, as root
	PYTHON=$(abspath $(BIN)/python) tests/slurm/run.sh

lint: $(VENV)/.installed-dev ## ruff and shellcheck
	$(BIN)/python -m ruff check .
	$(BIN)/shellcheck --external-sources --source-path=SCRIPTDIR vim/scripts/*.sh seg/scripts/*.sh det/scripts/*.sh vim/scripts/*.sbatch tests/slurm/*.sh .ci/run

bench: $(VENV)/.installed-bench ## Vim against DeiT and the kernels against their peers, on the CPU (20 minutes)
	$(BIN)/python benchmarks/run.py --device cpu

bench-quick: $(VENV)/.installed-bench ## the same in 2 minutes after the kernels' tests, into output/bench-quick
	$(BIN)/python benchmarks/run.py --device cpu --quick

bench-gpu: $(VENV)/.installed-bench ## the GPU's tests, then the same on a GPU
	@PYTHON=$(abspath $(BIN)/python) timeout 240 benchmarks/build_published.sh || echo "Going on without the published kernels."
	$(BIN)/python benchmarks/run.py --device cuda

# pip is the last thing that venv writes: its presence says that the environment is whole.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
		"Python 3.10 or newer is needed; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

# The stamps below make a repeated `make` instant and repeat an install whose inputs have changed.
$(VENV)/.installed: vim/vim_requirements.txt $(PACKAGE_SOURCES) | $(BIN)/pip
	@echo "Installing into $(VENV): about 2 minutes and 6 GB the first time."
	$(BIN)/python -m pip install --disable-pip-version-check \
		$(foreach package,$(PACKAGES),--editable ./$(package)) --requirement vim/vim_requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --requirement requirements-dev.txt
	@touch $@

$(VENV)/.installed-det: det/det_requirements.txt $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --requirement det/det_requirements.txt
	@touch $@

$(VENV)/.installed-bench: benchmarks/requirements.txt $(VENV)/.installed-dev
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --requirement benchmarks/requirements.txt
	@touch $@
