# make demo: train across two regions on this machine.  make test: run the tests.  Both make .venv first.
PYTHON ?= python3
BIN := .venv/bin
# More arguments for pip: where pip finds only a CUDA build of torch, name a place with a CPU build here.
PIP_ARGS ?=
# More overrides for the demo, e.g. make demo ARGS='outer.sync_every=10'.
ARGS ?=
# Which benchmarks: names in tests/bench.
BENCH ?= $(sort $(patsubst tests/bench/%.py,%,$(filter-out tests/bench/_%,$(wildcard tests/bench/*.py))))

.PHONY: demo test check bench venv
.DELETE_ON_ERROR:

demo: .venv/stamp
	$(BIN)/python -m launch.local 'regions=[eu, us]' +experiment=demo $(ARGS)

test: .venv/stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

check: .venv/stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/stamp
	@missed=0; for name in $(BENCH); do $(BIN)/python -m tests.bench.$$name || missed=1; done; exit $$missed

venv: .venv/stamp

define FIT
import sys
sys.exit(0 if (3, 11) <= sys.version_info[:2] < (3, 14) else
    f"PYTHON=$(PYTHON) is Python {sys.version.split()[0]}, and diloco needs 3.11, 3.12 or 3.13: "
    "run make PYTHON=/path/to/one.")
endef
export FIT

.venv/stamp: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "PYTHON=$(PYTHON) is not there: install Python 3.11 to 3.13, or run make PYTHON=/path/to/one." >&2; exit 1; }
	@$(PYTHON) -c "$$FIT"
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments: install its venv module (on Debian: apt-get install python3-venv)." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_ARGS) -e '.[dev]'
	@touch $@
