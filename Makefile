# Everything a newcomer needs: `make demo` shows the main job, `make test` proves the house.
VENV    ?= .venv
PYTHON  ?= python3
PY      := $(VENV)/bin/python
DEMO    ?= runs/demo
TEST_WORKERS ?= 2

export YOLO_OFFLINE := 1
export YOLO_AUTOINSTALL := false

.PHONY: demo test lint types contract unit clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[export,search,dev]"
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps yolov5  # its pins are old
	touch $@

demo: $(VENV)/.installed
	$(PY) datasets/shapes.py out=$(DEMO)/data
	$(VENV)/bin/yolo-prune run configs/demo.yaml data=$(DEMO)/data/data.yaml out=$(DEMO)

test: lint types contract unit

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.installed
	$(VENV)/bin/mypy

contract: $(VENV)/.installed
	$(VENV)/bin/lint-imports

unit: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(TEST_WORKERS) --dist worksteal  # long ones at the end are shared out

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache
