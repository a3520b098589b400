# Every target makes the environment it needs; PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
PROMPT ?= a purple cross, two blue rings, a red square above the cross and a small yellow star
RUN = $(VENV)/bin/python
WORKERS ?= 2

.PHONY: demo test test-slow lint format clean

# draws a prompt in the closed loop with the weights that come with the package
demo: $(VENV)/.run
	$(RUN) -m launch.generate --weights=miniature-sft --vlm=miniature-vlm-sft --vlm_config=configs/vlm.py:greedy \
	  --prompt="$(PROMPT)"

# lint, import order, unit tests on 8 simulated devices with shape checks, parity with PyTorch
test: $(VENV)/.dev lint
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal --jaxtyping-packages=clvr_jax,beartype.beartype -m "not slow"

# full-size and long checks: about 25 GB of free disk
test-slow: $(VENV)/.dev
	$(RUN) -m pytest -m slow -s

lint: $(VENV)/.dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

format: $(VENV)/.dev
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# constraints hold tested versions; torch without a GPU is the CPU build where pip finds one
$(VENV)/.run: pyproject.toml .ci/constraints.txt | $(VENV)/bin/python
	@began=$$(date +%s); $(RUN) -m pip install -q -c .ci/constraints.txt -e . && \
	  echo "environment: $$(( $$(date +%s) - began )) s"
	touch $@

$(VENV)/.dev: pyproject.toml .ci/constraints.txt | $(VENV)/bin/python
	@began=$$(date +%s); $(RUN) -m pip install -q -c .ci/constraints.txt -e ".[dev,parity]" && \
	  echo "environment: $$(( $$(date +%s) - began )) s"
	touch $(VENV)/.run $@

clean:
	rm -rf $(VENV) outputs .cache build dist
