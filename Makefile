# make demo: from a fresh clone to a finished tiny run and its report.  make test: what CI runs.
.PHONY: setup demo test smoke clean help
.DEFAULT_GOAL := help

POSTTRAIN := .venv/bin/posttrain

help:
	@echo "make setup   install everything into .venv (about 3 minutes; a second the next time)"
	@echo "make demo    setup, then the tiny recipe from nothing to a report in runs/tiny"
	@echo "make smoke   setup, then check this machine: posttrain doctor"
	@echo "make test    setup, ruff, pytest"
	@echo "make clean   remove caches and the tiny run (not .venv)"

setup:
	@bash environment/setup.sh

demo: setup
	$(POSTTRAIN) run recipes/tiny.yaml --run-dir runs/tiny

smoke: setup
	$(POSTTRAIN) doctor

test: setup
	.venv/bin/ruff check .
	.venv/bin/python -m pytest

clean:
	rm -rf runs/tiny build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
