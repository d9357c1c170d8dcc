# Two commands for a user: `make demo` and `make test`. Everything else is for developers.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
RIVALS := .venv-rivals
OLDEST := lightning==2.5.0 transformers==5.0.0 accelerate==1.10.1 huggingface-hub==1.33.0 tokenizers==0.22.2
TESTS  ?= tests/integrations/test_same_everywhere.py tests/integrations/lightning/test_hazards.py tests/integrations/test_accelerate_hazards.py

.PHONY: demo test check lint types architecture doctests docs site oldest bench rivals clean help

help:            ## what can be made here
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 16

# pip before 25.3 takes what it builds with from the first of these, later ones from the second
$(STAMP): export PIP_CONSTRAINT := build-constraints.txt
$(STAMP): export PIP_BUILD_CONSTRAINT := build-constraints.txt
$(STAMP): pyproject.toml constraints.txt build-constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not there: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "adadagrad needs Python >= 3.11, got %s; set PYTHON=/path/to/python3.11" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), once: some hundred megabytes, some minutes"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]' || { echo "not installed: pip fetches torch and others from the internet, so look at its message above and run make again" >&2; exit 1; }
	@touch $(STAMP)

demo: $(STAMP)   ## train the digits four ways and write the report
	$(BIN)/adadagrad compare --data digits
	@echo "open the report in a browser; $(BIN)/adadagrad --help lists what else there is"

test: $(STAMP)   ## the whole test suite, doctests included
	$(BIN)/python -m pytest -n 2

check: lint types architecture doctests   ## lint, types, architecture, doctests

lint: $(STAMP)
	$(BIN)/ruff check adadagrad tests benchmarks docs
	$(BIN)/ruff format --check adadagrad tests benchmarks docs

types: $(STAMP)
	$(BIN)/mypy

architecture: $(STAMP)
	$(BIN)/lint-imports

doctests: $(STAMP)
	$(BIN)/python -m pytest -q adadagrad

docs: $(STAMP)   ## write docs/equations.md anew, from the docstrings
	$(BIN)/python docs/make_equations.py

site: $(STAMP)   ## the documentation as web pages, docs/_build/html/index.html (a minute or two; runs the notebooks)
	$(BIN)/sphinx-build -W -E --keep-going -q -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html in a browser"

oldest: $(STAMP) ## that trainers go wrong and the adapters do not, on the oldest versions supported (TESTS=... for more)
	$(BIN)/python -m tests.integrations.versions $(OLDEST) -- -q -p no:cacheprovider $(TESTS)

bench: $(STAMP)  ## the timed comparisons, tables on the screen (about ten minutes)
	$(BIN)/python -m benchmarks.engine

rivals: $(RIVALS)/.installed  ## measuring beside other packages, in an environment of its own (some minutes)
	$(RIVALS)/bin/python -m benchmarks.rivals

$(RIVALS)/.installed: pyproject.toml constraints.txt benchmarks/rivals.txt
	$(PYTHON) -m venv $(RIVALS)
	$(RIVALS)/bin/python -m pip install --quiet --constraint constraints.txt --editable . numpy scipy
	$(RIVALS)/bin/python -m pip install --quiet --no-deps --requirement benchmarks/rivals.txt
	@touch $@

clean:           ## remove what is generated
	rm -rf $(VENV) $(RIVALS) runs build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
