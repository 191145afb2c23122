# Every target that needs .venv makes it and installs Tubelet there, once for each change of pyproject.toml.

PYTHON ?= python3
N ?= 200
BIN := .venv/bin

.PHONY: help demo test test-pages test-drills test-cluster drill lint bench bench-model bench-data bench-finetune bench-probe clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.venv/installed: pyproject.toml
	@test -d .venv || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing Tubelet into .venv (some minutes, about 6 GB)"
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: .venv/installed ## make videos, pretrain, finetune, and write runs/demo/report.html
	@$(BIN)/tubelet demo

test: .venv/installed ## run the tests
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup

test-pages: .venv/installed ## open every page in a headless Chromium, at two widths, light and dark
	@$(BIN)/python -m pytest tests/pages

test-drills: .venv/installed ## run the drills that take minutes: DeepSpeed, signals, W&B, kills within saves, other numbers of processes
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup tests/drills/long

drill: .venv/installed ## kill runs N=200 times, mostly inside saves, change worlds under every ZeRO stage, disturb runs on SLURM in every way; hours
	@$(BIN)/python -m tests.drills.kill_many --kills $(N)
	@$(BIN)/python -m tests.drills.zero_worlds
	@$(BIN)/python -m pytest tests/cluster/test_runs.py --matrix

test-cluster: .venv/installed ## run the tests that need SLURM, on a cluster of two nodes that they start here
	@$(BIN)/python -m pytest tests/cluster

lint: .venv/installed ## check the code with ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: bench-model ## measure against peers, as ratios, and the order of samples at scale
	@$(BIN)/python -m tests.benchmarks.decode
	@$(BIN)/python -m tests.benchmarks.decode_child
	@$(BIN)/python -m tests.benchmarks.order_scale
	@$(BIN)/python -m tests.benchmarks.save_stall

bench-model: .venv/installed ## measure a pretraining step against transformers, and the encoders; some minutes
	@$(BIN)/python -m tests.benchmarks.model_step

bench-data: .venv/installed ## measure the data path and what sets its speed, as ratios; some minutes
	@$(BIN)/python -m tests.benchmarks.data_path
	@$(BIN)/python -m tests.benchmarks.speed_knobs

bench-finetune: .venv/installed ## measure a finetuning step against transformers, and multi-view decoding; some minutes
	@$(BIN)/python -m tests.benchmarks.finetune_step

bench-probe: .venv/installed ## measure whether k-NN accuracy during pretraining tells the finetuned accuracy; a quarter of an hour
	@$(BIN)/python -m tests.benchmarks.knn_and_finetuning

clean: ## remove .venv and runs
	rm -rf .venv runs
