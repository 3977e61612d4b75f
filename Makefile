# make demo      train on the tiny world, from nothing (set-up included)
# make test      lint, types and the default tests (set-up included)
# make test-all  the same with the long tests
# make setup EXTRA=cpu|gpu   only the set-up, into .venv
# What is installed already stays; a new .venv is for CPUs unless told otherwise.
EXTRA ?= $(or $(patsubst .venv/.installed-%,%,$(firstword $(wildcard .venv/.installed-*))),cpu)
ARGS ?=
.PHONY: setup demo test test-all lint
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# make/make/p' Makefile

setup:
	@tools/install/setup.sh $(EXTRA)

demo: setup
	.venv/bin/python -m caprl_async.run conf=conf/demo.yaml $(ARGS)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

test: lint
	.venv/bin/python -m pytest -n 2 --dist loadfile

# Long tests start whole rings, which take all cores: one at a time.
test-all: test
	.venv/bin/python -m pytest -m slow
