# Two commands do all the set-up: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
ZOO := .venv-zoo
BIN := $(VENV)/bin

.PHONY: quickstart install test test-zoo check clean help

help:
	@echo "make quickstart   install edgekd into $(VENV) and run the main job on embedded data (about 5 minutes)"
	@echo "make test         install the development tools and run all checks and tests"
	@echo "make test-zoo     test timm and torchvision models in an environment of their own (6 GB)"
	@echo "make clean        remove the environments and the runs"

quickstart: $(VENV)/.installed
	$(BIN)/edgekd compress recipes/classification/quickstart.yaml

install: $(VENV)/.installed

test: $(VENV)/.installed-dev
	VENV=$(VENV) scripts/check

test-zoo: $(ZOO)/.installed
	$(ZOO)/bin/python -m pytest -m zoo tests/zoo

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all-cpu]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(ZOO)/.installed: pyproject.toml constraints-zoo.txt
	$(PYTHON) -m venv $(ZOO)
	$(ZOO)/bin/python -m pip install --quiet --constraint constraints-zoo.txt --editable '.[zoo,dev]'
	touch $@

clean:
	rm -rf $(VENV) $(ZOO) runs
