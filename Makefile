# Everything lives in .venv; each target sets it up first, so it works on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help browser demo test check format bench bench-gpu evidence clean

help:  ## Show the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

# pip 25.1 is the first that knows dependency groups
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,gpu]' --group dev
	touch $@

demo: .venv/installed  ## Train on handwritten digits, watched; then with the classic mistake.
	$(BIN)/batchnorm demo

check: .venv/installed  ## Lint, types, and the floors' imports.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# the HTML report is tested in a browser; without one those tests are skipped, and say so
browser:
	@{ command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null || { \
	  root=$$([ "$$(id -u)" = 0 ] || echo sudo -n); \
	  $$root apt-get update -qq && $$root apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	} || echo "No Chromium here, and none could be installed: the HTML report's browser tests are skipped."

test: check browser  ## All checks and tests.
	$(BIN)/pytest --numprocesses auto --dist worksteal -m "not as_installed" --jaxtyping-packages=batchnorm,beartype.beartype
	$(BIN)/pytest --numprocesses auto --dist worksteal -m as_installed

format:  .venv/installed  ## Put the code into its form.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/installed  ## Run the benchmarks; nothing else should run meanwhile.
	$(BIN)/python benchmarks/layers.py --output benchmarks/layers.md
	$(BIN)/python benchmarks/memory.py --output benchmarks/memory.md
	$(BIN)/python benchmarks/watching.py --output benchmarks/watching.md
	$(BIN)/python benchmarks/checkpoints.py --output benchmarks/checkpoints.md
	$(BIN)/python benchmarks/false_alarms.py --output benchmarks/false_alarms.md
	$(BIN)/python benchmarks/folding.py --output benchmarks/folding.md
	$(BIN)/python benchmarks/adaptation.py --output benchmarks/adaptation.md
	$(BIN)/python benchmarks/batch_means.py --output benchmarks/batch_means.md
	$(BIN)/python benchmarks/sync.py --output benchmarks/sync.md
	$(BIN)/python benchmarks/faults.py --output benchmarks/faults.md
	$(BIN)/python docs/synchronization.py

bench-gpu: .venv/installed  ## Run the GPU's benchmarks on this machine's GPU.
	$(BIN)/python benchmarks/gpu_layers.py --shapes quick --no-compile
	$(BIN)/python benchmarks/gpu_layers.py --output benchmarks/results/gpu_layers_bf16.md
	$(BIN)/python benchmarks/gpu_step.py --output benchmarks/results/gpu_step.md
	$(BIN)/python benchmarks/gpu_layers.py --layout contiguous --no-compile --output benchmarks/results/gpu_layers_bf16_contiguous.md
	$(BIN)/python benchmarks/gpu_layers.py --dtype fp16 --no-compile --output benchmarks/results/gpu_layers_fp16.md
	$(BIN)/python benchmarks/gpu_layers.py --dtype fp32 --no-compile --output benchmarks/results/gpu_layers_fp32.md

evidence: .venv/installed  ## Run all claims of the lab and write docs/evidence.md; it goes on where it was.
	$(BIN)/batchnorm lab run all --profile full --output docs/evidence
	$(BIN)/batchnorm lab report docs/evidence --output docs/evidence.md

clean:  ## Remove what was installed and cached.
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
