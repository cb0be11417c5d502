# make demo | make test | make test-card-stack | make lint | make clean
#
#   CARD_VENV    where the environment of a card's software stack goes (default .venv-card; several GB)
#   VENV         where the environment goes (default .venv)
#   PYTHON       the Python 3.11 to build it with
#   TORCH_INDEX  address of the PyTorch project's CPU wheel index, for machines whose own index
#                offers only CUDA builds of torch
#   PYTEST_ARGS  more words for pytest, e.g. --slow
#   WORKERS      test processes side by side (default 2): each mostly keeps one core, tracing and compiling

VENV ?= .venv
WORKERS ?= 2
PYTHON ?= python3.11
# A file's tests stay together: they share engines and compiled graphs.
PYTEST = -m pytest --numprocesses $(WORKERS) --dist loadfile
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
STAMP = $(VENV)/.installed

ifdef TORCH_INDEX
export PIP_EXTRA_INDEX_URL := $(TORCH_INDEX)
endif

.PHONY: demo test test-card-stack lint clean preflight install

demo: install
	$(VENV)/bin/gcu-compile demo-model
	$(VENV)/bin/python examples/offline_inference.py

test: install $(VENV)/torchao/.installed
	$(VENV)/bin/python $(PYTEST) $(PYTEST_ARGS)

# The versions that a card has today: all tests of gcu_compile, and vLLM 0.26 on the emulated card. Up to an hour on two
# busy cores.
CARD_VENV ?= .venv-card
CARD_PIP = $(CARD_VENV)/bin/python -m pip --disable-pip-version-check
CARD_TESTS = --ignore tests/vllm tests
CARD_VLLM_TESTS = $(addprefix tests/vllm/, test_gcu.py test_gcu_config.py test_vllm_private.py test_blocks.py \
	test_encoder_attention.py)

test-card-stack: preflight $(CARD_VENV)/.installed $(CARD_VENV)/torchao/.installed
	$(CARD_VENV)/bin/python $(PYTEST) $(CARD_TESTS) $(PYTEST_ARGS)
	$(CARD_VENV)/bin/python $(PYTEST) $(CARD_VLLM_TESTS) $(PYTEST_ARGS)

$(CARD_VENV)/.installed: requirements/card.lock pyproject.toml
	[ -x $(CARD_VENV)/bin/python ] || $(PYTHON) -m venv $(CARD_VENV)
	$(CARD_PIP) install --quiet --no-deps -r requirements/card.lock
	$(CARD_PIP) install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# What only tests import, in a folder beside the packages.
$(VENV)/torchao/.installed: requirements/torchao.lock | $(STAMP)
	$(PIP) install --quiet --no-deps --upgrade --target $(@D) -r $<
	touch $@

$(CARD_VENV)/torchao/.installed: requirements/torchao.lock | $(CARD_VENV)/.installed
	$(CARD_PIP) install --quiet --no-deps --upgrade --target $(@D) -r $<
	touch $@

lint: install
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV)

preflight:
	@PYTHON=$(PYTHON) sh tools/preflight.sh

install: preflight $(STAMP)

# Installed anew when a pin or the package's own declaration changes, else not at all.
$(STAMP): requirements/host.lock pyproject.toml
	[ -x $(VENV)/bin/python ] || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-deps -r requirements/host.lock
	$(PIP) install --quiet --no-deps --no-build-isolation ./requirements/vllm-name --editable .
	touch $(STAMP)
