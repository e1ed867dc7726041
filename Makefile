# `make run` and `make test` need Python 3.11 or newer and make, nothing else;
# everything they install goes into .venv. Run them as often as you like.

SHELL := /bin/sh
PY := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help run test test-image soak check format lock dashboards pictures env clean tools

help:
	@echo 'make run     start everything on this machine (DELINEATE_PORT=3000, DELINEATE_HOME=.delineate)'
	@echo 'make test    run the tests against real servers, all but those of the Docker image'
	@echo 'make test-image  run those; needs a Docker engine (CONTRIBUTING.md)'
	@echo 'make soak    break everything for MINUTES (5) while jobs run, and prove that none was lost'
	@echo 'make check   lint, formatting, types, import rules'
	@echo 'make format  format the code'
	@echo 'make lock    take the newest versions of what the service depends on into requirements.lock'
	@echo 'make dashboards  write dashboards/*.json anew, after their Python was edited'
	@echo 'make pictures    draw the dashboards for docs/images from a service under load'
	@echo 'make env     write .env and secrets/ for docker compose and swarm; what exists stays'
	@echo 'make clean   remove .venv and caches; the data in .delineate stays'

# Through the tether, so that the service ends with make even if make is killed.
run: .venv/.run
	@exec $(PY) -m delineate.tether - $(PY) -m delineate up

# Tests of one file stay together, and files in the order of tests/conftest.py.
PYTEST := $(PY) -m pytest --dist loadfile --no-loadscope-reorder

# Three at a time on two cores, because tests wait for servers to die and come back; more would be late for each other.
test: .venv/.dev tools
	@$(PYTEST) -n 3 --ignore tests/image $(PYTEST_ARGS)

# Two at a time: each runs a stack of its own. Whoever asks for these wants them: without an engine they fail.
test-image: .venv/.dev
	@CI=true $(PYTEST) -n 2 tests/image $(PYTEST_ARGS)

# Needs neither Python nor .venv, so that a server with nothing but Docker can say it.
env:
	@sh conf/make-env

# Kills and restarts everything for MINUTES while jobs run, then proves that none was lost.
MINUTES ?= 5
soak: .venv/.dev
	@$(PY) -m tests.chaos.soak --minutes $(MINUTES)

check: .venv/.dev
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports

format: .venv/.dev
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

# Exact versions, with hashes, of what the image installs: one file for every Python and platform. From PyPI alone,
# whatever other indexes and folders this machine knows. uv makes it, because pip locks for one platform only; it has
# a venv of its own, so that no test runs with it.
lock: .venv/bin/python
	@test -x .venv-lock/bin/uv || { $(PY) -m venv .venv-lock && .venv-lock/bin/python -m pip install --quiet uv; }
	@env -u UV_INDEX -u UV_INDEX_URL -u UV_EXTRA_INDEX_URL -u UV_FIND_LINKS -u UV_CONSTRAINT -u UV_OVERRIDE \
	  .venv-lock/bin/uv --no-config pip compile --quiet --upgrade --universal --generate-hashes --python-version 3.11 \
	  --default-index https://pypi.org/simple --custom-compile-command 'make lock' pyproject.toml -o requirements.lock

dashboards: .venv/.dev
	@$(PY) -m dashboards

pictures: .venv/.dev
	@$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[pictures]'
	@$(PY) -m tests.dashboards.pictures

clean:
	@rm -rf .venv .venv-lock build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A .venv whose Python has gone (upgraded, moved) is made anew. While make reads this file, because later it would
# remember the stamps in there as present.
$(shell test -x .venv/bin/python || rm -rf .venv)

# The first Python on PATH that is new enough; a name that exists but does not run (a pyenv shim) is passed over.
.venv/bin/python:
	@for candidate in python3 python3.13 python3.14 python3.12 python3.11; do \
	  if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found=$$candidate; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo 'make: no Python 3.11 or newer on PATH (looked for python3, python3.11 to python3.14); install one' >&2; exit 2; \
	fi; \
	if ! $$found -c 'import ensurepip, venv' 2>/dev/null; then \
	  echo "make: $$found has no venv module; install it (on Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 2; \
	fi; \
	echo "Creating .venv with $$($$found --version)"; \
	rm -rf .venv && $$found -m venv .venv || { rm -rf .venv; exit 2; }

.venv/.run: pyproject.toml .venv/bin/python
	@echo 'Installing what delineate needs into .venv; this takes a moment, once'
	@$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[embedded]'
	@touch $@

.venv/.dev: pyproject.toml .venv/bin/python
	@echo 'Installing what delineate and its tests need into .venv; this takes a moment, once'
	@$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ .venv/.run

# Programs that the tests use to look at archives and at the service as its users do. Name and Debian package.
TOOLS := unzip:unzip 7z:p7zip-full bsdtar:libarchive-tools curl:curl
# Only for CI, because Debian makes these services when they are installed; elsewhere their tests are skipped. They are
# not started at once (https://people.debian.org/~hmh/invokerc.d-policyrc.d-specification.txt), but with the machine.
ifeq ($(CI),true)
TOOLS += haproxy:haproxy caddy:caddy nginx:nginx promtool:prometheus
TOOLS += $(foreach name,node redis nginx,prometheus-$(name)-exporter:prometheus-$(name)-exporter)
endif
tools:
	@missing=; packages=; PATH="$$PATH:/usr/sbin"; \
	for tool in $(TOOLS); do \
	  command -v $${tool%%:*} >/dev/null 2>&1 || { missing="$$missing $${tool%%:*}"; packages="$$packages $${tool##*:}"; }; \
	done; \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	    echo "Installing$$packages"; \
	    policy=/usr/sbin/policy-rc.d; \
	    test -e $$policy || { trap "rm -f $$policy" EXIT; printf '#!/bin/sh\nexit 101\n' >$$policy && chmod +x $$policy; }; \
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$packages; } >/dev/null; \
	  else \
	    echo "make: the tests need$$missing; install them (Debian packages:$$packages)" >&2; exit 2; \
	  fi; \
	fi
