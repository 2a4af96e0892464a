# make test   create the environment, install, run the whole test suite
# make demo   create the environment, install, train CoDyRA and plain LoRA on the embedded benchmark, compare them
# make bench  the CPU benchmarks       make lint  ruff, mypy       make clean  remove what make made
# make bench-gpu  every GPU goal: build, correctness on the device, G1 to G11, into runs/gpu
# make docs   the documentation site, into build/docs; every warning is an error
# make sanitize  the tests of the extension with AddressSanitizer and UndefinedBehaviorSanitizer
# make faults  every fault with its full count, beside PEFT, into docs/faults.md; a quarter of an hour
# make wheels    a wheel for each Python that is here, into dist/      make versions  install and test them, table into docs/
# make aot    compile every Triton kernel for every target, on the newest Triton and on 3.6; the resource tables into docs/
PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs/demo
BIN := $(VENV)/bin

# one thread a process and processes in parallel: small products gain nothing from a second thread
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= $(OMP_NUM_THREADS)

SOURCES := setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/*)

.PHONY: install test sanitize demo docs bench bench-gpu results faults aot aot36 wheels versions lint clean

install: $(VENV)/installed

# also after csrc/ or the build files changed, since the extension is built at install time
$(VENV)/installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); Python 3.10 or newer is needed. Say make PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	$(BIN)/fastlora doctor
	@touch $@

test: install
	$(BIN)/pytest -n 2 --dist loadfile

sanitize: install
	$(BIN)/python tests/csrc/sanitized.py

demo: install
	rm -rf $(RUNS) && mkdir -p $(RUNS)
	@echo "LoRA r = 16 trains beside CoDyRA; its log is $(RUNS)/lora.log"
	@$(BIN)/fastlora train --method lora --method.rank 16 --out $(RUNS)/lora > $(RUNS)/lora.log 2>&1 & lora=$$!; \
	$(BIN)/fastlora train --method codyra --out $(RUNS)/codyra || { kill $$lora; exit 1; }; \
	wait $$lora || { cat $(RUNS)/lora.log >&2; exit 1; }
	$(BIN)/fastlora compare $(RUNS)/codyra $(RUNS)/lora --out $(RUNS)/comparison.png

docs: install
	$(BIN)/python -m sphinx -E -a -W --keep-going -q -d build/doctrees docs build/docs
	@echo "built: build/docs/index.html"

bench: install
	$(BIN)/pytest bench --benchmark-columns=min,median,stddev,rounds

bench-gpu: install
	$(BIN)/python bench/gpu_suite.py --out runs/gpu

results: install
	$(BIN)/python bench/methods.py run --runs runs/methods
	$(BIN)/python bench/methods.py show --runs runs/methods --out bench/results/methods.json --docs docs/methods.md --readme README.md

faults: install
	$(BIN)/python bench/fault_suite.py

AOT := -m fastlora.triton_kernels.aot

aot: install aot36
	$(BIN)/python $(AOT) --csv bench/results/aot.csv --docs docs/kernels.md

# Triton 3.6 over the packages of the environment beside it; its interpreter needs numpy < 2.4
aot36: install
	test -x $(VENV)36/bin/python || $(PYTHON) -m venv $(VENV)36
	$(VENV)36/bin/python -m pip install --quiet 'triton==3.6.*' 'numpy<2.4'
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_paths()["purelib"])' \
	  > $$($(VENV)36/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/beside.pth
	$(VENV)36/bin/python $(AOT) --csv bench/results/aot_triton36.csv

wheels: install
	$(BIN)/nox -s sdist wheels

# several GB for each pair of Python and torch, one after the other, removed when it is tested
versions: wheels
	$(BIN)/nox -s versions

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	rm -rf $(VENV) $(VENV)36 build dist .nox *.egg-info runs fastlora/_C*.so fastlora/_build_info.json
