# Two commands do everything, set-up included, in .venv beside this file:
#   make demo    run a tiny Scout and a tiny Maverick end to end, with or without a GPU
#   make test    every kernel against its reference, on each executor there is
# Both are idempotent: the set-up runs again only when its inputs change.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed
PIP    := $(BIN)/python -m pip --disable-pip-version-check

# An executor of compiled sm_90 code on the CPU, where one lies beside the checkout.
PTXRUN := $(abspath $(dir $(wildcard ../shared/ptxrun/__init__.py))..)
ifneq ($(wildcard ../shared/ptxrun/__init__.py),)
  # tests/test_executed_lane.py runs all that ships under six schedules, whatever is named here.
  SCHEDULES := late
  COMPILED = PYTHONPATH=$(PTXRUN) $(BIN)/python -m pytest --executor ptx \
             --ptx-schedules $(SCHEDULES)
else
  COMPILED = $(BIN)/python -m pytest --executor compile
endif

# One thread per worker: the kernels are interpreted, and torch's own threads would fight.
export OMP_NUM_THREADS := 1
WORKERS ?= 2

.PHONY: demo test test-kernels test-compiled test-versions test-long test-tritons \
        test-transformers lint typecheck clean

demo: $(STAMP)
	$(BIN)/llama4-triton demo

test: test-kernels test-compiled test-versions

test-kernels: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS)

test-compiled: $(STAMP)
	$(COMPILED) -n $(WORKERS)

# Main loops on the Triton that vLLM and SGLang pin, and on the newest one; test-tritons has the rest.
test-versions: $(VENV)/triton-3.8.0/installed $(VENV)/triton-3.9.0/installed
	PYTHONPATH=$(CURDIR)/$(VENV)/triton-3.8.0 $(BIN)/python -m pytest --executor compile \
	  tests/compile/test_sm90.py -k main_loops
	PYTHONPATH=$(CURDIR)/$(VENV)/triton-3.9.0 $(BIN)/python -m pytest --executor compile \
	  tests/compile/test_sm90.py -k main_loops

test-long: SCHEDULES := late,late-7,early,eager,races
test-long: test test-tritons test-transformers
	$(BIN)/python -m pytest -n $(WORKERS) --long -m long
	$(COMPILED) -n $(WORKERS) --long -m long

# The operators and every gate on the other supported Triton versions, beside the pinned one.
TRITONS := 3.6.0 3.8.0 3.9.0
test-tritons: $(TRITONS:%=$(VENV)/triton-%/installed)
	for version in $(TRITONS); do \
	  PYTHONPATH=$(CURDIR)/$(VENV)/triton-$$version $(BIN)/python -m pytest -n $(WORKERS) tests/kernels && \
	  PYTHONPATH=$(CURDIR)/$(VENV)/triton-$$version $(BIN)/python -m pytest -n $(WORKERS) \
	    --executor compile tests/compile || exit 1; \
	done

# The adapter on the other versions of transformers that it names. The oldest wants an older hub.
TRANSFORMERS := 5.16.1 5.19.0
test-transformers: $(TRANSFORMERS:%=$(VENV)/transformers-%/installed)
	for version in $(TRANSFORMERS); do \
	  PYTHONPATH=$(CURDIR)/$(VENV)/transformers-$$version $(BIN)/python -m pytest -n $(WORKERS) \
	    tests/engines/test_transformers.py tests/engines/test_transformers_counts.py || exit 1; \
	done

$(VENV)/transformers-%/installed: $(STAMP)
	$(PIP) install --quiet --no-deps --target $(@D) transformers==$* \
	  $(if $(filter 5.16.%,$*),"huggingface-hub<2" httpx httpcore)
	touch $@

$(VENV)/triton-%/installed: $(STAMP)
	$(PIP) install --quiet --no-deps --target $(@D) triton==$*
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy refuses a checkout root that is itself a package, so it reads an installed wheel.
typecheck: $(STAMP)
	rm -rf $(VENV)/wheel build
	$(PIP) install --quiet --no-deps --no-build-isolation --target $(VENV)/wheel .
	cd $(VENV) && MYPYPATH=wheel bin/mypy --config-file ../pyproject.toml -p llama4_triton

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade "setuptools>=77" wheel
	$(PIP) install --quiet -c constraints.txt torch triton
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e ".[cli,text,dev]"
	# Only for the tokenizer file inside it; its other dependencies are not needed.
	$(PIP) install --quiet --no-deps "llama-models==0.3.0"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
