# Two commands for newcomers: `make demo` and `make test`. Both set everything up by themselves.
PYTHON ?= python3.12
BIN := .venv/bin
export PYGAME_HIDE_SUPPORT_PROMPT = 1
export SDL_VIDEODRIVER = dummy
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test test-slurm check static slurm bench docs lock clean

demo: .venv/demo
	$(BIN)/latentact demo

# Four processes of one thread each for two cores, since some tests wait; the static checks run beside them.
test test-slurm check: export OMP_NUM_THREADS = 1
test:
	@$(MAKE) --no-print-directory -j 2 .venv/ready slurm
	@mkdir -p build; $(MAKE) --no-print-directory static >build/static.log 2>&1 & static=$$!; \
	$(BIN)/pytest --tx "4*popen//python=$(BIN)/python tests/workers.py" --dist loadfile --no-loadscope-reorder; \
	tests=$$?; \
	wait $$static; static=$$?; cat build/static.log; exit $$((tests || static))

# cluster=slurm on a real SLURM, which the tests start on this machine.
test-slurm: .venv/ready
	@command -v slurmctld >/dev/null || { apt-get update -qq && apt-get install -y --no-install-recommends slurm-wlm; }
	$(BIN)/pytest tests/slurm

# In a container, where it starts no service, SLURM is installed for its tests; elsewhere they are skipped without it.
slurm:
	@if [ "$$(id -u)" = 0 ] && [ ! -d /run/systemd/system ] && ! command -v slurmctld >/dev/null && command -v apt-get >/dev/null; then \
	  { apt-get update && apt-get install -y --no-install-recommends slurm-wlm; } >/dev/null 2>&1 \
	  || echo "SLURM cannot be installed; its tests are skipped."; fi

check: static
	$(BIN)/pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

static: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/pyrefly check
	$(BIN)/lint-imports

bench: .venv/ready
	$(BIN)/python benchmarks/lapo_step.py

# A virtual environment of Python 3.12 with the pinned packages: those of the demo, or of everything. uv comes through pip.
.venv/demo: LOCK = requirements-demo.lock
.venv/ready: LOCK = requirements.lock
.venv/demo .venv/ready: requirements-demo.lock requirements.lock pyproject.toml $(wildcard plugins/*/pyproject.toml)
	@for python in $(PYTHON) python3 python; do \
	  $$python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && break; python=; done; \
	if [ -z "$$python" ]; then echo "Python 3.12 is missing; install it (for example: pyenv install 3.12)." >&2; exit 1; fi; \
	[ -x $(BIN)/python ] || $$python -m venv .venv
	@$(BIN)/uv --version >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet "uv>=0.9"
	$(BIN)/uv pip install --quiet --python $(BIN)/python --requirement $(LOCK)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable . \
	  $(foreach plugin,$(dir $(wildcard plugins/*/pyproject.toml)),--editable $(plugin))
	@touch $@

# The documentation as a site, build/docs/index.html; warnings, such as broken links, are errors.
docs: .venv/ready
	$(BIN)/sphinx-build -W --keep-going -q -E -d build/doctrees docs build/docs

lock:
	$(BIN)/uv pip compile pyproject.toml --extra all --extra features --extra umap --extra vla --extra wandb --extra scale --extra export --extra metaworld --extra gail --extra procgen --extra xland --extra studio --group dev --group docs --python-version 3.12 \
	  --no-header --no-emit-index-url --quiet --output-file requirements.lock
	$(BIN)/uv pip compile pyproject.toml --extra all --python-version 3.12 --constraint requirements.lock \
	  --no-header --no-emit-index-url --quiet --output-file requirements-demo.lock

clean:
	rm -rf .venv runs build
