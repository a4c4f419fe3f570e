# make demo | demo-rollout | test | lint | docs: each sets up what it needs the first time, and only then.
VENV := .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: help demo demo-rollout test test-releases check-upstream lint docs bench format clean

help:
	@echo 'make demo    a real vLLM answers with token ids, shown in a table'
	@echo 'make demo-rollout'
	@echo '             two runners run an agent that uses a tool; the triplets a trainer would use, and a page to inspect them'
	@echo 'make test    all tests, against a real vLLM'
	@echo 'make test-releases [RELEASES="0.8.5 0.32.0"]'
	@echo '             the same questions to each vLLM since 0.8.5, each in an environment of its own (30 GB for all)'
	@echo 'make check-upstream [VLLM=0.32.0] [STORE=1] [ONLY=TEXT]'
	@echo '             the tests of vLLM itself, with and without this package; with STORE=1 also recording (an hour or two)'
	@echo 'make lint    formatting, lint and types'
	@echo 'make docs    the documentation as a site, in site/'
	@echo 'make bench   what it costs every Python process, beside its peers, a server, and recording (an hour)'
	@echo 'make format  put the formatting right'
	@echo 'make clean   remove what the others made'

# vLLM is installed once; we are installed again when what that depends on changes.
$(VENV)/.ready: pyproject.toml tools/make_env.py agentlightning.pth
	$(PYTHON) tools/make_env.py $(VENV)
	@touch $@

.cache/tiny-model/config.json: tests/common/tiny_model.py | $(VENV)/.ready
	@echo 'making the tiny model'
	@rm -rf .cache/tiny-model
	@$(VENV)/bin/python -m tests.common.tiny_model >/dev/null 2>.cache.log || { cat .cache.log; exit 1; }
	@rm -f .cache.log; touch $@

demo: $(VENV)/.ready .cache/tiny-model/config.json
	@$(VENV)/bin/python -m examples.demo

demo-rollout: $(VENV)/.ready .cache/tiny-model/config.json
	@$(VENV)/bin/python -m examples.loop

test: $(VENV)/.ready .cache/tiny-model/config.json
	$(VENV)/bin/python -m pytest

test-releases: $(VENV)/.ready .cache/tiny-model/config.json
	$(VENV)/bin/python -m tests.releases.environments $(RELEASES)
	$(VENV)/bin/python -m pytest tests/releases --releases='$(RELEASES)' --keep-results

check-upstream: $(VENV)/.ready
	$(VENV)/bin/python -m tools.check_upstream $(VLLM) $(if $(STORE),--store) $(if $(ONLY),--only '$(ONLY)')

lint: $(VENV)/.ready
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

docs: $(VENV)/.ready
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	@echo 'the documentation is in site/index.html'

bench: $(VENV)/.ready .cache/tiny-model/config.json
	$(VENV)/bin/python -m benchmarks

format: $(VENV)/.ready
	$(VENV)/bin/ruff format
	$(VENV)/bin/ruff check --fix

clean:
	rm -rf $(VENV) .cache dist site .hypothesis .pytest_cache .ruff_cache
