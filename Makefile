# SPDX-License-Identifier: Apache-2.0
# make demo | test | test-avx2 | test-0.28 | trust | models | rehearse | supply | lint | format | clean. Each sets up what it needs in .venv first.
# BACKEND=cpu or cuda and VLLM=0.32 choose another than the machine's and the newest.
# To run with an environment of your own instead: make test PYTHON=/path/to/python
.PHONY: demo test test-avx2 test-0.28 trust models rehearse supply lint format setup clean
.DEFAULT_GOAL := demo

SYSTEM_PYTHON ?= python3
BACKEND ?= auto
VLLM ?=
ifdef PYTHON
setup:
else
PYTHON := .venv/bin/python
setup:
	@$(SYSTEM_PYTHON) scripts/bootstrap.py --backend $(BACKEND) $(if $(VLLM),--vllm $(VLLM)) $(SETUP_FLAGS)
endif

demo: setup
	@$(PYTHON) scripts/demo.py

test: SETUP_FLAGS = --with-compiler
test: setup
	@$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Tests that depend on the CPU's instructions, as a CPU with AVX2 alone runs them.
test-avx2: SETUP_FLAGS = --with-compiler
test-avx2: setup
	@$(PYTHON) scripts/on_cpu.py avx2 -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Some of the tests on another vLLM, which scripts/on_vllm.py unpacks into .cache/.
test-0.28: SETUP_FLAGS = --with-compiler
test-0.28: setup
	@$(PYTHON) scripts/on_vllm.py 0.28.0 -n 2 --dist loadfile $(ARGS)

# The long runs, one after another so that each has the machine to itself.
trust: SETUP_FLAGS = --with-compiler
trust: setup
	@$(PYTHON) -m pytest -m trust tests/trust $(ARGS)

# Every architecture of a table against stock vLLM; benchmarks/results/models.md.
models: setup
	@$(PYTHON) benchmarks/check_models.py $(ARGS)

# vLLM for CUDA, installed for real and walked without a GPU to where it asks for one.
rehearse:
	@$(SYSTEM_PYTHON) scripts/rehearse.py $(ARGS)

# Licences, the wheel built twice, its list of components, advisories; the results are in dist/.
supply: setup
	@$(PYTHON) scripts/supply.py

lint: setup
	@$(PYTHON) scripts/lint.py

format: setup
	@$(PYTHON) scripts/lint.py --fix

# An environment that scripts/bootstrap.py did not make stays.
clean:
	[ ! -e .venv/vllm-nvfp4.stamp ] || rm -rf .venv
	rm -rf .cache build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find vllm_nvfp4 csrc tests scripts benchmarks -name __pycache__ -prune -exec rm -rf {} +
