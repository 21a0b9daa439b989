# make demo · make test: each does its own set-up in .venv. `make help` lists the rest.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
INPUTS := settings.ini setup.py constraints.txt
ARGS   ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo inspect test bench reproduce lab docs docs-serve export clean-notebooks outputs readme wheel clean \
        coverage fuzz lock sdist mutants versions check-clean check-export check-readme check-style check-notebooks check-tests check-docs check-browser check-wheel check-sdist

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1@/p' $(MAKEFILE_LIST) | awk -F@ '{printf "  make %-16s %s\n", $$1, $$2}'
	@echo "  another Python:  make PYTHON=python3.12 test      options of the demo:  make demo ARGS=--quick"

# --- set-up -------------------------------------------------------------------
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
	  { echo "Python 3.10 to 3.13 is needed and '$(PYTHON)' is not one: make PYTHON=python3.12 test" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q 'pip>=25'

$(VENV)/.demo: $(INPUTS) | $(BIN)/python
	@echo "installing laid_nb into $(VENV): about 5 GB, a few minutes"
	$(BIN)/python -m pip install -e . -c constraints.txt
	@touch $@

$(VENV)/.dev: $(INPUTS) | $(BIN)/python
	@echo "installing laid_nb and its tools into $(VENV): about 5 GB, a few minutes"
	$(BIN)/python -m pip install -e '.[dev]' -c constraints.txt
	@touch $(VENV)/.demo $@

# --- use ----------------------------------------------------------------------
demo: $(VENV)/.demo  ## distil the embedded student and measure its window
	$(BIN)/laid demo $(ARGS)

inspect: $(VENV)/.demo  ## look at the heads of the embedded models, or ARGS=, in a browser
	$(BIN)/laid inspect $(ARGS)

lab: $(VENV)/.dev  ## read and run the notebooks
	$(BIN)/jupyter lab nbs

bench: $(VENV)/.dev  ## time and memory against naive versions and of a whole step; writes data/results/bench_*.json
	@for script in spectra mixing attention step cache readers inspector gpu; do echo "== $$script"; $(BIN)/python benchmarks/$$script.py $(ARGS) || exit 1; done
	@$(BIN)/python benchmarks/tables.py

reproduce: $(VENV)/.dev  ## make every result of nbs/experiments again (hours; goes on where it was stopped)
	@for script in training_free reproduce length labels self_anchor students farther eq7 teachers tasks budget ablation why heads leakage retrieval art; do echo "== $$script"; $(BIN)/python experiments/$$script.py $(ARGS) || exit 1; done

docs: export HF_HUB_OFFLINE := 1
docs: $(VENV)/.dev  ## build the documentation site into site/, and check it
	$(BIN)/python docs/build.py

docs-serve: docs  ## build it and show it on 127.0.0.1, port 8000 (make docs-serve PORT=8001)
	$(BIN)/python -m http.server $(or $(PORT),8000) --bind 127.0.0.1 --directory site

# --- write --------------------------------------------------------------------
export: $(VENV)/.dev  ## notebooks -> laid_nb/*.py
	$(BIN)/nbdev_export

clean-notebooks: $(VENV)/.dev  ## strip notebook metadata, keep ids and outputs
	$(BIN)/nbdev_clean

outputs: $(VENV)/.dev  ## run ARGS=nbs/x.ipynb, or all, and store the outputs that are not what is stored
	$(BIN)/python tests/check_notebooks.py --write $(ARGS)

# Cells of the index only show what they print; links of the notebook are relative to nbs/, those of README.md to the root.
readme: $(VENV)/.dev  ## nbs/index.ipynb -> README.md
	@rm -rf README_files
	@$(BIN)/jupyter nbconvert --log-level WARN --to markdown --no-input nbs/index.ipynb --output-dir . --output README
	@sed -e 's#](\.\./#](#g' -e 's#src="\.\./#src="#g' -e 's#](\([A-Za-z0-9_/]*\.ipynb\)#](nbs/\1#g' README.md > $(VENV)/README.md
	@mv $(VENV)/README.md README.md

wheel: $(VENV)/.dev  ## dist/laid_nb-*.whl
	@rm -rf build dist
	@$(BIN)/python -m build --wheel --no-isolation > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	@rm -rf build
	@ls -l dist/*.whl

lock: $(VENV)/.dev  ## constraints.txt -> requirements-lock.txt, with hashes (needs uv)
	$(BIN)/python tests/lock.py

sdist: $(VENV)/.dev  ## dist/laid_nb-*.tar.gz
	@rm -rf dist *.egg-info
	@$(BIN)/python -m build --sdist --no-isolation > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	@ls -l dist/*.tar.gz

# --- test ---------------------------------------------------------------------
test: $(VENV)/.dev  ## notebooks clean and exported, README, style, notebooks run, tests, site, browser, wheel
	@$(MAKE) --no-print-directory check-clean
	@$(MAKE) --no-print-directory check-export
	@$(MAKE) --no-print-directory check-readme
	@$(MAKE) --no-print-directory check-style
	@$(MAKE) --no-print-directory check-notebooks ARGS=
	@$(MAKE) --no-print-directory check-tests
	@$(MAKE) --no-print-directory check-docs
	@$(MAKE) --no-print-directory check-browser
	@$(MAKE) --no-print-directory check-wheel
	@echo "make test: all passed"

# $(call unchanged,paths,what to do): the working tree must equal what git has, or, unstaged, what was added
define unchanged
	@if [ -e .git ]; then \
	  { git --no-pager diff --stat --exit-code -- $(1) && new=$$(git ls-files --others --exclude-standard -- $(1)) && \
	    { [ -z "$$new" ] || { echo "not in git: $$new"; false; }; } } || { echo "make test: $(2)" >&2; exit 1; }; \
	else echo "no git here: not compared"; fi
endef

check-clean: clean-notebooks
	@echo "== notebooks are clean"
	$(call unchanged,nbs,notebooks were not clean or not committed: look at the change then git add nbs)

check-export: export
	@echo "== laid_nb/ is what the notebooks export"
	$(call unchanged,laid_nb,laid_nb was not what the notebooks export: look at the change then git add laid_nb)

check-readme: readme
	@echo "== README.md is what nbs/index.ipynb says"
	$(call unchanged,README.md README_files,README.md was not made from nbs/index.ipynb: look at the change then git add README.md)

check-style: $(VENV)/.dev  ## ruff, and what it has no rule for
	@echo "== style"
	$(BIN)/ruff check
	$(BIN)/python -m pytest tests/test_style.py -q

check-notebooks: $(VENV)/.dev  ## run every notebook, or ARGS=, without the cells marked slow; outputs are what is stored
	@echo "== notebooks"
	$(BIN)/python tests/check_notebooks.py $(ARGS)

# in two processes of one thread each; 5 is pytest's word for no test selected
TRAINED := $(patsubst %,tests/test_%.py,train cli cache shard demo live anchors benchmarks plan kills)
check-tests: export OMP_NUM_THREADS := 1
check-tests: $(VENV)/.dev  ## pytest only
	@echo "== tests"
	@$(BIN)/python -m pytest $(TRAINED) -q --durations=5 $(ARGS) > $(VENV)/trained.log 2>&1 & first=$$!; \
	  $(BIN)/python -m pytest tests --ignore=tests/browser --ignore=tests/test_style.py $(TRAINED:%=--ignore=%) -q --durations=5 $(ARGS); rest=$$?; \
	  wait $$first; first=$$?; cat $(VENV)/trained.log; case "$$first $$rest" in "0 0"|"0 5"|"5 0") ;; *) exit 1;; esac

# a browser that is not there is installed, where Debian's packages can be
check-browser: $(VENV)/.dev  ## widgets, laid inspect and the site in a real browser (make docs first)
	@echo "== browser"
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get && apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends chromium fonts-dejavu-core; } || \
	  { echo "make check-browser: install Chromium or Chrome (Debian: apt-get install chromium fonts-dejavu-core)" >&2; exit 1; }
	$(BIN)/python -m pytest tests/browser -q --durations=5 $(ARGS)

coverage: export COVERAGE_PROCESS_START := $(CURDIR)/.coveragerc
coverage: $(VENV)/.dev  ## lines and branches of the package that tests and notebooks run
	@rm -f .coverage .coverage.*
	-$(BIN)/python -m pytest tests --ignore=tests/browser -q $(ARGS)
	-$(BIN)/python tests/check_notebooks.py
	@$(BIN)/coverage combine -q && $(BIN)/coverage report

fuzz: $(VENV)/.dev  ## hostile input for every command (an hour); ARGS="--cases 500" for less
	$(BIN)/python tests/fuzz.py $(ARGS)
	@$(BIN)/python docs/trust.py > /dev/null

mutants: $(VENV)/.dev  ## do the tests notice when the core is wrong? (hours; goes on where it was stopped)
	$(BIN)/python tests/mutate.py $(ARGS)
	@$(BIN)/python docs/trust.py > /dev/null

versions: $(VENV)/.dev  ## tests of the core with the lowest and the newest versions (an hour, 10 GB, needs uv)
	$(BIN)/python tests/versions.py $(ARGS)
	@$(BIN)/python docs/trust.py > /dev/null

check-docs: $(VENV)/.dev
	@echo "== site"
	@$(MAKE) --no-print-directory docs

check-wheel: wheel  ## build the wheel, install it elsewhere, use it there
	@echo "== wheel"
	$(BIN)/python tests/check_wheel.py dist/*.whl

check-sdist: sdist  ## unpack the source archive elsewhere and run tests of it from there
	@echo "== source archive"
	$(BIN)/python tests/check_sdist.py dist/*.tar.gz

clean:  ## remove what was built (not .venv)
	rm -rf build dist _docs_src site *.egg-info .pytest_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print | xargs rm -rf
