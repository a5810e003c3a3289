# Each target works from a bare checkout, on a machine with Python 3.10 or newer.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: run test lint clean

# ARGS are gunicorn's: make run ARGS='--workers 2'
run: .venv/server
	@exec $(BIN)/pagerduty-compat serve $(ARGS)

# ARGS are pytest's: make test ARGS='-k alertmanager'
test: .venv/test
	@$(BIN)/pytest $(ARGS)

lint: .venv/test
	$(BIN)/ruff format --check --diff
	$(BIN)/ruff check
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info

.venv/server .venv/test: setup.cfg pyproject.toml
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--editable '.[server$(if $(filter %test,$@),$(comma)test)]' >&2
	@touch $@

comma := ,
