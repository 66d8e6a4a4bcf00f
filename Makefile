# Everything a newcomer needs: `make demo` shows the main job, `make test` proves the house.
VENV    ?= .venv
PYTHON  ?= python3
PY      := $(VENV)/bin/python
DEMO    ?= runs/demo
TEST_WORKERS ?= 2
SELECTED := -m "not exhaustive"
comma   := ,

export YOLO_OFFLINE := 1
export YOLO_AUTOINSTALL := false

.PHONY: demo docs test test-all lint types contract unit clean

# uv took 20 to 42 s where pip took three and a half minutes. It does not read pip's configuration, so it is told where
# pip would look; where it does not find everything there, pip does the work.
PIP     := $(PY) -m pip --disable-pip-version-check
SETTING  = $$($(PIP) config get global.$(1) 2>/dev/null)
UV      := $(PY) -m uv pip install --quiet --index-strategy unsafe-best-match
INSTALL  = UV_DEFAULT_INDEX="$${PIP_INDEX_URL:-$(call SETTING,index-url)}" \
	UV_INDEX="$${PIP_EXTRA_INDEX_URL:-$(call SETTING,extra-index-url)}" \
	UV_FIND_LINKS="$${PIP_FIND_LINKS:-$(call SETTING,find-links)}" \
	$(UV) -c constraints.txt $(1) 2>/dev/null || $(PIP) install --quiet -c constraints.txt $(1)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt uv
	$(call INSTALL,-e ".[export$(comma)int8$(comma)search$(comma)dev]")
	$(call INSTALL,--no-deps yolov5)  # its pins are old
	$(call INSTALL,--no-deps tensorrt-stubs)  # types without the library, which needs a GPU
	touch $@

demo: $(VENV)/.installed
	$(PY) datasets/shapes.py out=$(DEMO)/data
	$(VENV)/bin/yolo-prune run configs/demo.yaml data=$(DEMO)/data/data.yaml out=$(DEMO)

docs: $(VENV)/.installed
	$(PY) -m pdoc --docformat google --output-directory runs/docs yolo_prune

test: lint types contract unit

test-all: SELECTED :=
test-all: test

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/vermin -q --no-tips --violations -t=3.8- yolo_prune/__init__.py yolo_prune/errors.py yolo_prune/files.py \
		yolo_prune/device yolo_prune/export/templates/run.py

types: $(VENV)/.installed
	$(PY) tools/tensorrt_types.py
	$(VENV)/bin/mypy

contract: $(VENV)/.installed
	$(VENV)/bin/lint-imports

unit: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(PY) -m pytest $(SELECTED) -n $(TEST_WORKERS) --dist worksteal --durations=30  # long ones at the end are shared out

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache
