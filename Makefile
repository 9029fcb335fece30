# make demo      install what is missing and run the whole way on real images: prepare, pretrain, evaluate, table
# make demo-text, make demo-proteins   the same for texts and for proteins, with data from packages of Debian
# make test      lint, types, tests (on 1 to 4 processes; on a throw-away SLURM if installed): about 12 minutes on 2 busy cores
# make test-slow the tests that take longest, and those for a GPU if there is one
# make test-all  both: what CI runs
#                SLURM for the tests, as root: bash tools/install_slurm.sh
# make docs      the documentation as a site, in build/docs/html
# make lock      renew requirements.lock
# make dist     the source archive and the wheel, in dist/; make ffcv-wheel: ffcv's, for machines without a compiler
# TORCH=cpu      with any of them: an installation without CUDA's gigabytes (make TORCH=cpu demo)
# make clean     remove runs and prepared data; `rm -rf .venv` removes the installation

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ifneq ($(wildcard ../shared/data),)
export SIMCLR_DATA ?= $(abspath ../shared/data)
endif

.PHONY: demo demo-text demo-proteins test test-slow test-all lint install docs lock dist ffcv-wheel clean
.DELETE_ON_ERROR:

demo: install
	$(BIN)/simclr-dist demo

demo-text: install
	$(BIN)/python tools/demo_tokens.py text

demo-proteins: install
	$(BIN)/python tools/demo_tokens.py proteins

# Three at once on two cores, because tests on SLURM mostly wait; those that hold time limits run alone afterwards.
test: install lint
	$(BIN)/pytest -m "not slow and not gpu and not timed" -n 3 --dist loadfile
	$(BIN)/pytest -m "not slow and not gpu and timed"

test-slow: install
	$(BIN)/pytest -m "slow or gpu"

test-all: test test-slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

# The stamp is written last, so an interrupted installation starts again; a second one takes no time.
$(VENV)/.installed: requirements.lock pyproject.toml tools/install.sh
	PYTHON=$(PYTHON) bash tools/install.sh $(VENV)
	touch $@

docs: install
	$(BIN)/python -m docs.site.build build/docs

lock: install
	$(BIN)/uv pip compile --universal --python-version 3.11 --extra ffcv --extra dev --extra docs --no-emit-index-url \
	    --custom-compile-command "make lock" pyproject.toml -o requirements.lock

dist: install
	$(BIN)/python -m build --outdir dist

ffcv-wheel:
	PYTHON=$(PYTHON) bash tools/build_ffcv_wheel.sh dist

clean:
	rm -rf runs data/*.beton data/*.beton.json
