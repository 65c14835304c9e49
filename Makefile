# Everything runs in .venv, made on first use. PYTHON chooses the interpreter (3.11 or later).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# Images of containers often set it; every process would then compile torch and transformers anew, some ten seconds each.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test rehearse regress reference bench chaos mini mini-report lint clean

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/python -m uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[all,dev]'
	touch $@

METHODS := none,negative_prompt,uce,esd
demo: $(INSTALLED)
	$(BIN)/python -m erasebench -m method=$(METHODS) task=object target=airplane
	$(BIN)/python -m erasebench -m method=$(METHODS) task=celebrity n=10
	$(BIN)/python -m erasebench leaderboard

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --ignore=tests/rehearsal

rehearse: $(INSTALLED)   # the photo world in small
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile tests/rehearsal

regress: $(INSTALLED)
	$(BIN)/python -m erasebench regress --results build/regress

reference: $(INSTALLED)   # dry_run=true says what is missing, and about how long it takes
	$(BIN)/python -m erasebench reference $(if $(filter true,$(dry_run)),--dry-run)

chaos: $(INSTALLED)
	ERASEBENCH_CHAOS=20 $(BIN)/python -m pytest tests/run/test_run.py -k kill

bench: $(INSTALLED)
	$(BIN)/python tests/benchmarks

mini: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node $$(nproc) -m erasebench.mini.train all

mini-report: $(INSTALLED)
	$(BIN)/python -m erasebench.mini.report

lint: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) build *.egg-info
