# Each target works from a bare checkout, on a machine with Python 3.10 or newer.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: run test chaos lint clean

# ARGS are gunicorn's: make run ARGS='--workers 2'
run: .venv/server
	@exec $(BIN)/pagerduty-compat serve $(ARGS)

# ARGS are pytest's: make test ARGS='-k alertmanager'. Most of the time, tests wait for servers.
test: .venv/test
	@$(BIN)/pytest -n 3 --dist loadscope $(ARGS)

# What takes too long for make test, and the long forms of tests/test_chaos.py and
# tests/test_machine.py: about 40 minutes.
chaos: .venv/test
	@$(BIN)/python tests/chaos.py
	@$(BIN)/pytest -q -m slow
	@EXAMPLES=20000 $(BIN)/pytest -q -s tests/test_machine.py

lint: .venv/test
	$(BIN)/ruff format --check --diff
	$(BIN)/ruff check
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info

.venv/server .venv/test: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or \
		sys.exit("Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	@echo 'installing into .venv ...' >&2
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--editable '.[server$(if $(filter %test,$@),$(comma)redis$(comma)test)]' >&2
	@touch $@

comma := ,
