# make demo   pre-train, fine-tune, compare and report in a few minutes (DATA=folder for your own photos)
# make test   formatter, linter, type checker and all tests;  make test-fast  a few minutes' worth
# make bench  our speed and memory beside timm's, transformers' and torchvision's (half an hour on 2 cores); make bench-gpu
# make claims the pages of docs/claims anew, from their result files ("swinscale claims NAME --data IMAGES" runs a claim)
# make chaos  kills, full disks, broken files, lost processes, 10,000 steps: the long form of tests/chaos (10 minutes)
# Each makes .venv on first use and installs pinned versions; a second call installs nothing.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-fast check format bench bench-gpu claims chaos clean

demo: .venv/.installed
	$(BIN)/swinscale demo $(if $(DATA),--data "$(DATA)")

test: check
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: .venv/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

check: .venv/.installed
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

bench: .venv/.installed
	$(BIN)/python -m bench cpu
	$(BIN)/python -m bench where
	$(BIN)/python -m bench scaling
	$(BIN)/python -m bench page

bench-gpu: .venv/.installed
	$(BIN)/python -m bench gpu
	$(BIN)/python -m bench page

claims: .venv/.installed
	$(BIN)/swinscale claims --pages

chaos: .venv/.installed
	SWINSCALE_CHAOS=long $(BIN)/python -m pytest tests/chaos

format: .venv/.installed
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "swinscale needs Python 3.11 or newer; name one with make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' || \
		{ echo "Python's venv module is missing; on Debian and Ubuntu: apt-get install python3-venv"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[all]" --group dev
	@touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build dist runs
