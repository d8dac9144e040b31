# make train   a text detector learns with the loss and leaves pictures in runs/
# make test    the tests
# make bench   how fast the losses are on the CPU; make gpu: everything that only a GPU shows
# make lint, make wheel, make docs, make soak, make clean
#
# Everything is installed into .venv. VENV=/some/where takes another virtual environment; VENV= takes
# the Python at hand as it is and installs nothing. TORCH= names the PyTorch to install: this release
# is a CUDA build on PyPI for Linux and so uses an NVIDIA GPU where there is one. FCRN_FUSED_BUILD=
# and the other variables of setup.py choose what is compiled.
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
STAMPS := build/stamps
INSTALL := @true
CLANG_FORMAT := clang-format
CLANG_TIDY := clang-tidy
else
PY := $(VENV)/bin/python
STAMPS := $(VENV)/stamps
CLANG_FORMAT := $(VENV)/bin/clang-format
CLANG_TIDY := $(VENV)/bin/clang-tidy
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check
endif

# The requirements of the example and the benchmarks, which the tests run as well.
EXTRA_REQUIREMENTS := examples/text_detection/requirements.txt benchmarks/requirements.txt
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
FORMATTED := $(shell find csrc tests/arm64 tests/cuda_on_host -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# What every machine compiles; nvcc has its own warnings.
TIDIED := csrc/ops.cpp $(wildcard csrc/cpu/*.cpp)

# Two processes run the tests, each a file at a time, where there is a pytest-xdist that can keep the
# order of the files: the longest do not come last. ARGS="-n 0" is one process, for --pdb.
HAS_XDIST = from importlib.metadata import version as v; \
  assert tuple(map(int, v("pytest-xdist").split(".")[:2])) >= (3, 7)
PARALLEL = $(shell $(PY) -c '$(HAS_XDIST)' 2> /dev/null && \
  echo --numprocesses=2 --dist=loadfile --no-loadscope-reorder)

.PHONY: train test bench gpu lint wheel docs soak clean
.DELETE_ON_ERROR:

# Threads that wait do not spin, so that the process that makes the images has their core.
train: export OMP_WAIT_POLICY ?= passive
train: $(STAMPS)/built $(STAMPS)/extras
	$(PY) -m examples.text_detection.train $(ARGS)

test: $(STAMPS)/built $(STAMPS)/extras $(STAMPS)/test
	$(PY) -m pytest $(PARALLEL) $(ARGS)

bench: $(STAMPS)/built $(STAMPS)/extras
	$(PY) benchmarks/loss_speed.py $(ARGS)

gpu: $(STAMPS)/extras $(STAMPS)/test
	$(PY) benchmarks/gpu.py $(ARGS)

soak: $(STAMPS)/built $(STAMPS)/test
	$(PY) -m tests.soak $(ARGS)

lint: $(STAMPS)/lint $(STAMPS)/built
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(CLANG_FORMAT) --dry-run --Werror $(FORMATTED)
	database=$$(ls -td build/temp.* | head -1) && \
	  $(PY) -m ninja -C "$$database" -t compdb compile | sed 's#-I\([^ ]*/site-packages/\)#-isystem\1#g' \
	    > "$$database/compile_commands.json" && \
	  echo $(TIDIED) | xargs -n 1 -P 2 $(CLANG_TIDY) --quiet -p "$$database"

# The source distribution, and the wheel that it builds; LOCAL=+cu126 ends the wheel's version. All
# dates are the commit's, so that a commit always gives the same bytes. See docs/releasing.md.
wheel: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct || date +%s)
wheel: export LDFLAGS += -Wl,--discard-all # some local names hold nvcc's process id
wheel: $(STAMPS)/wheel
	rm -rf dist build/sdist && mkdir -p dist build/sdist
	$(PY) setup.py --quiet sdist --formats=tar --dist-dir build/sdist
	cd build/sdist && tar -xf *.tar && tar -c --sort=name --mtime=@$$SOURCE_DATE_EPOCH --mode=go=rX \
	  --owner=0 --group=0 --numeric-owner fcrn_fused-*/ | gzip -n > ../../dist/$$(basename *.tar).gz
	printf '[egg_info]\ntag_build = $(LOCAL)\n' > build/local.cfg
	DIST_EXTRA_CONFIG="$(CURDIR)/build/local.cfg" \
	  $(PY) -m pip wheel --no-cache-dir --no-build-isolation --no-deps --wheel-dir dist ./build/sdist/*/
	$(PY) -m twine check --strict dist/*
	$(PY) -m auditwheel show dist/*.whl
	$(PY) -m zipfile --list dist/*.whl
	cd dist && sha256sum *

docs: $(STAMPS)/built docs/requirements.txt
	$(INSTALL) -r docs/requirements.txt
	$(PY) -m mkdocs build --strict

clean:
	rm -rf build dist runs *.egg-info fcrn_fused/*.so

$(STAMPS)/venv:
ifneq ($(strip $(VENV)),)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip setuptools wheel
endif
	@mkdir -p $(@D) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	$(INSTALL) "$(TORCH)" numpy ninja pybind11
	@touch $@

# Named after what a build depends on beside the sources, so that another choice builds anew.
CHOICES := $(STAMPS)/for_$(shell echo "$(FCRN_FUSED_BUILD) $(TORCH_CUDA_ARCH_LIST)" | tr -c '[:alnum:].\n' _)
$(CHOICES): $(STAMPS)/venv
	@rm -f $(STAMPS)/for_* && touch $@

$(STAMPS)/built: $(STAMPS)/torch $(SOURCES) $(CHOICES)
	$(PY) setup.py --quiet build_ext --inplace
	@touch $@

$(STAMPS)/extras: $(STAMPS)/torch $(EXTRA_REQUIREMENTS)
	$(INSTALL) $(addprefix -r ,$(EXTRA_REQUIREMENTS))
	@touch $@

$(STAMPS)/test: $(STAMPS)/torch pyproject.toml
	$(INSTALL) pytest pytest-xdist hypothesis keras nvidia-cuda-nvdisasm onnx onnxscript tensorboard
	@touch $@

$(STAMPS)/wheel: $(STAMPS)/torch
	$(INSTALL) twine auditwheel
	@touch $@

LINTERS := ruff mypy clang-format 'clang-tidy==22.*'
$(STAMPS)/lint: $(STAMPS)/venv
	$(INSTALL) $(LINTERS)
ifeq ($(strip $(VENV)),)
	@$(PY) -c 'import ruff, mypy, ninja' && command -v $(CLANG_FORMAT) $(CLANG_TIDY) > /dev/null || \
	  { echo "make lint needs: pip install ninja $(LINTERS)" >&2; false; }
endif
	@touch $@
