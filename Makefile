# make demo | demo-rollout | demo-train | demo-agent | check | test | lint | docs: each sets up what it needs the first time,
# and only then.
# With NEWEST=1: all of that with the newest of everything, in an environment of its own.
VENV := $(if $(NEWEST),.venv-newest,.venv)
LOCK := tools/locks/environment.txt
PYTHON ?= $(shell command -v python3.11 || command -v python3)
SHELL := /bin/bash
HYBRID := 0.33.0
# The oldest, one of the middle and the newest.
THREE_RELEASES := 0.8.5 0.14.1 0.33.0
# Each has servers of its own; more than two want more than two cores and 24 GB.
PROCESSES := 2
# A container's shell often switches bytecode off: each process of the tests would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE
.DELETE_ON_ERROR:
.PHONY: help demo demo-rollout demo-train demo-agent check quick-tests test test-all test-pythons test-hybrid test-releases test-three-releases check-release check-upstream lint docs commands bench format lock clean always

help:
	@echo 'make demo    a real vLLM answers with token ids, shown in a table'
	@echo 'make demo-rollout'
	@echo '             two runners run an agent that uses a tool; the triplets a trainer would use, and a page to inspect them'
	@echo 'make demo-train [TRAINER=verl]'
	@echo '             TRL or verl trains a tiny model on the ids that vLLM recorded: the reward goes up within minutes'
	@echo 'make demo-agent AGENT=claude|codex|opencode|qwen|mini'
	@echo '             a real coding agent, its calls as a tree, and the rows a trainer would use'
	@echo 'make check   lint, types and the tests that start no server: what to run after each edit (a minute)'
	@echo 'make test    every part, with a real vLLM, real clients and databases (a quarter of an hour)'
	@echo 'make test-all'
	@echo '             also endurance, every way to install, other Pythons and three releases of vLLM (an hour and a half)'
	@echo 'make test-pythons'
	@echo '             what needs no vLLM, with each Python from 3.10 on that is found'
	@echo 'make test-hybrid [HYBRID=$(HYBRID)] [TESTS=tests/recording]'
	@echo '             the same on a release without a CPU build: its Python, over the compiled part of the one before'
	@echo 'make test-releases [RELEASES="0.8.5 0.32.0"]'
	@echo '             the same questions to each vLLM since 0.8.5, each in an environment of its own (30 GB for all)'
	@echo 'make test-three-releases'
	@echo '             the same to three of them: $(THREE_RELEASES)'
	@echo 'make check-release VLLM=0.34.0'
	@echo '             is all that is patched there, in any release or wheel file, and what serves in it that is new'
	@echo 'make check-upstream [VLLM=0.32.0] [STORE=1] [ONLY=TEXT]'
	@echo '             the tests of vLLM itself, with and without this package; with STORE=1 also recording (an hour or two)'
	@echo 'make lint    formatting, lint and types'
	@echo 'make docs    the documentation as a site, in site/'
	@echo 'make commands'
	@echo '             write docs/commands.md: the help of each command, and the commonest errors'
	@echo 'make bench   what it costs every Python process, beside its peers, a server, and recording (an hour)'
	@echo 'make format  put the formatting right'
	@echo 'make lock    write the exact versions of what is installed to tools/locks, with which all of these work'
	@echo 'make test NEWEST=1'
	@echo '             the same, like each of these, with the newest of everything, in .venv-newest'
	@echo 'make clean   remove what the others made'

# Made anew when the lock is not the one that it was made with (its text counts, not its time); the newest, on another
# day. This checkout is installed again when what that depends on changes.
$(VENV)/.ready: pyproject.toml tools/make_env.py tools/lock.py agentlightning.pth _agentlightning.py \
		$(if $(NEWEST)$(shell cmp -s $(LOCK) $(VENV)/made-with || echo other),always)
	$(PYTHON) -m tools.make_env $(if $(NEWEST),--newest) $(VENV)
	@touch $@

.cache/tiny-model/config.json: tests/common/tiny_model.py | $(VENV)/.ready
	@echo 'making the tiny model'
	@rm -rf .cache/tiny-model
	@$(VENV)/bin/python -m tests.common.tiny_model >/dev/null 2>.cache.log || { cat .cache.log; exit 1; }
	@rm -f .cache.log; touch $@

demo: $(VENV)/.ready .cache/tiny-model/config.json
	@$(VENV)/bin/python -m examples.demo

demo-rollout: $(VENV)/.ready .cache/tiny-model/config.json
	@$(VENV)/bin/python -m examples.demo_rollout

demo-train: $(VENV)/.ready .cache/tiny-model/config.json
	@$(VENV)/bin/python -m tools.trainers -m examples.train $(if $(TRAINER),--trainer $(TRAINER))

demo-agent: $(VENV)/.ready .cache/tiny-model/config.json
	@$(VENV)/bin/python -m examples.agent $(AGENT)

# In one process, the tests would take nearly twice as long as pyright (67 s of CPU beside 38).
check: $(VENV)/.ready
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target quick-tests lint

quick-tests: $(VENV)/.ready
	$(VENV)/bin/python -m pytest --tier=check --numprocesses=$(PROCESSES)

test: $(VENV)/.ready .cache/tiny-model/config.json
	$(VENV)/bin/python -m pytest --tier=test --numprocesses=$(PROCESSES)

test-all: $(VENV)/.ready .cache/tiny-model/config.json
	$(VENV)/bin/python -m pytest --tier=all --numprocesses=$(PROCESSES)
	$(MAKE) test-pythons
	$(MAKE) test-three-releases

test-pythons: $(VENV)/.ready
	$(VENV)/bin/python -m tests.other_pythons

test-releases: $(VENV)/.ready .cache/tiny-model/config.json
	$(VENV)/bin/python -m tests.releases.environments $(RELEASES)
	$(VENV)/bin/python -m pytest tests/releases --releases='$(RELEASES)' --keep-results

test-three-releases:
	$(MAKE) test-releases RELEASES='$(THREE_RELEASES)'

test-hybrid: $(VENV)/.ready .cache/tiny-model/config.json
	$(VENV)/bin/python -m tests.releases.environments $(HYBRID)
	.cache/releases/$(HYBRID)/bin/python -m pytest $(TESTS)

check-release: $(VENV)/.ready .cache/tiny-model/config.json
	$(VENV)/bin/python -m tools.check_release --run $(VLLM)

check-upstream: $(VENV)/.ready
	$(VENV)/bin/python -m tools.check_upstream $(VLLM) $(if $(STORE),--store) $(if $(ONLY),--only '$(ONLY)')

lint: $(VENV)/.ready
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

docs: $(VENV)/.ready
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	@echo 'the documentation is in site/index.html; to search it, too: $(VENV)/bin/mkdocs serve'

commands: $(VENV)/.ready
	$(VENV)/bin/python -m tools.commands

bench: $(VENV)/.ready .cache/tiny-model/config.json
	$(VENV)/bin/python -m benchmarks

format: $(VENV)/.ready
	$(VENV)/bin/ruff format
	$(VENV)/bin/ruff check --fix

# From what is installed; the files say how a version is changed.
lock: $(VENV)/.ready
	$(VENV)/bin/python -m tools.make_lock

clean:
	rm -rf .venv .venv-newest .cache dist site .hypothesis .pytest_cache .ruff_cache
