# make demo    a picture from a Chinese and an English prompt, from nothing
# make test    every test that needs no ComfyUI
# make test-host  the tests inside a ComfyUI and in its page; COMFYUI_PATH says which (docs/testing.md)
# make validate   what others' validators of ComfyUI packs say (docs/testing.md)
# make lint    ruff and mypy
# make check-workflows  what is in .github, by the schemas of GitHub
# make pack    what the ComfyUI registry would get, into dist/; make publish TAG=vX.Y.Z gives it there (CONTRIBUTING.md)
# make host    an environment for the ComfyUI at COMFYUI_PATH, in its folder, as CI makes it
# make fuzz    damaged files of every kind, FUZZ_INPUTS of them (docs/testing.md)
# make soak   bulk drawing, preparing and training killed at random moments (docs/testing.md); Linux
# make bench   benchmarks/*.py, one after the other
# make evidence  what the fast modes cost, with the embedded model, into docs/fast; hours, and goes on where it stopped
# make mutants  wrong formulas on purpose, to test the tests; hours, and goes on where it stopped (docs/testing.md)
# make gpu     the tests and figures of a CUDA device, or one ROW of them; DEVICE=cpu TINY=1 tries them without one
#              (docs/testing.md)
# make gpu-wheels  what a machine without network may lack for it, into .whl/
#
# TORCH_INDEX  where pip takes torch from, for those who want the CPU or another CUDA build:
#              make demo TORCH_INDEX=URL
# PYTHON       the Python that .venv is made with
# CONSTRAINTS  the versions that are installed: constraints.txt, or constraints-oldest.txt with the oldest promised
# GPU_PYTHON   the Python that `make gpu` runs with; default: that of .venv

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
CONSTRAINTS ?= constraints.txt
COMFYUI_PATH ?= $(HOME)/comfy/ComfyUI
OUT ?= outputs/demo
FUZZ_INPUTS ?= 50000
FUZZ_SEED ?= 1
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
DEVICE ?= cuda
TINY ?=
ROW ?=
GPU_PYTHON ?=
GPU_WHEELS := einops comfy-kitchen diffusers peft torchao pydantic pydantic-core annotated-types typing-inspection typing-extensions
# of the machine that the wheels are for; pip knows no "at least"
GPU_WHEELS_FOR ?= --python-version 3.12 --implementation cp \
	$(foreach n,17 24 27 28,--platform manylinux_2_$(n)_x86_64) --platform manylinux2014_x86_64

ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
PIP := $(BIN)/python -m pip install --disable-pip-version-check

TOOLS := .tools/$(notdir $(BIN))

.PHONY: demo test test-host validate lint fuzz mutants evidence bench soak gpu gpu-wheels clean
.PHONY: check-workflows pack publish host

demo: $(VENV)/.headless
	$(BIN)/python -m hydit_core.generate --prompt "红苹果" --prompt "a red apple" --seed 1 --out $(OUT)

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests $(PYTEST_ARGS)

# With the Python of that ComfyUI, not with ours. HOST_ARGS go to pytest: HOST_ARGS="tests/host -k smoke"
test-host:
	$(PYTHON) tests/run_host.py $(HOST_ARGS)

validate:
	$(PYTHON) tests/validate.py

lint: $(VENV)/.test
	$(BIN)/python -m ruff check .
	@# The clone's name need not be one that Python takes for a package, which to mypy this folder is.
	ln -sfn "$(CURDIR)" $(VENV)/hydit
	$(BIN)/python -m mypy $(VENV)/hydit/hydit_core $(VENV)/hydit/nodes

fuzz: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzz.py --inputs $(FUZZ_INPUTS) --seed $(FUZZ_SEED)

soak: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/soak.py $(SOAK_ARGS)

bench: $(VENV)/.test
	for file in $(filter-out benchmarks/gpu.py benchmarks/fast.py,$(wildcard benchmarks/*.py)); do \
		echo "== $$file"; $(BIN)/python $$file || exit 1; done

gpu: $(if $(GPU_PYTHON),,$(VENV)/.test)
	$(or $(GPU_PYTHON),$(BIN)/python) tests/run_gpu.py --device $(DEVICE) $(if $(TINY),--tiny) $(if $(ROW),--only $(ROW))

# EVIDENCE_ARGS go to the script: EVIDENCE_ARGS="forecast --prompts 16"
evidence: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fast.py $(EVIDENCE_ARGS)
	$(BIN)/python benchmarks/fast_pages.py

mutants: $(VENV)/.test
	$(BIN)/python tests/mutants/run.py $(MUTANTS_ARGS)

gpu-wheels:
	rm -rf .whl
	$(PYTHON) -m pip --disable-pip-version-check download -q --only-binary=:all: --no-deps $(GPU_WHEELS_FOR) \
		-d .whl -c constraints.txt $(GPU_WHEELS)

check-workflows: .tools/.installed
	$(TOOLS)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(TOOLS)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(TOOLS)/check-jsonschema --builtin-schema vendor.github-issue-forms \
		$(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(TOOLS)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml

pack: .tools/.installed
	$(TOOLS)/python tests/registry.py --out dist/node.zip

publish: .tools/.installed
	$(TOOLS)/python tests/registry.py --publish $(TAG)

host:
	test -x $(COMFYUI_PATH)/.venv/bin/python || $(PYTHON) -m venv $(COMFYUI_PATH)/.venv
	$(COMFYUI_PATH)/.venv/bin/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch torchvision torchaudio
	$(COMFYUI_PATH)/.venv/bin/python -m pip install -r $(COMFYUI_PATH)/requirements.txt

clean:
	rm -rf $(VENV) build dist *.egg-info .whl .gpu-site .tools

# Commands of others that look at the repository itself.
.tools/.installed: tests/tools.txt
	$(PYTHON) -m venv --clear .tools
	$(TOOLS)/python -m pip install --quiet --disable-pip-version-check -r tests/tools.txt
	touch $@

# One environment serves all; torch goes first, so that its build is chosen once and by the user.
$(VENV)/.torch: $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' $(CONSTRAINTS))"
	touch $@

$(VENV)/.%: $(VENV)/.torch pyproject.toml
	$(PIP) -e ".[$*]" -c $(CONSTRAINTS)
	touch $@
