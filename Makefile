# The one entry point: CI and the README call these targets. `make` alone lists them.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
# On a machine without an index: SETUP= installs nothing, and BIN=FOLDER has the Python to use.
SETUP ?= .venv/.installed
BIN := .venv/bin
GENERATOR := .venv-protos/bin
PIP_INSTALL := -m pip install -qq --disable-pip-version-check

SERVE_FLAGS ?=
PYTEST_FLAGS ?=
# Without the types: the type checkers and the stubs are of one version only. Without the tests that
# need PEFT, which the packages do not: it wants a newer accelerate.
LOWEST_TESTS ?= tests/client tests/server tests/engine tests/wire --ignore tests/client/test_types.py \
    --ignore tests/engine/test_lora_rows.py --ignore tests/engine/test_adapter_reading.py
# A worker for each hardware thread, up to four: a worker and the servers that its tests start take
# about 2 GB. "auto" would count two threads of one core, as small CI machines have, as one.
# PYTEST_FLAGS=-n0 runs the tests in one process.
PARALLEL := -n logical --maxprocesses 4 --dist worksteal
# Whether `make test` runs `make test-tools` first: yes, no, or auto (if CI=true, or as root in a
# container).
INSTALL_TEST_TOOLS ?= auto
BENCH_FLAGS ?=
OBSERVE_FLAGS ?=
CHAOS_FLAGS ?=
FLEET_FLAGS ?=
TRACE_FLAGS ?=
NOISE_FLAGS ?=
WORDS_FLAGS ?=
TRAIN_FLAGS ?=
JUDGE_FLAGS ?=
WHEELS_FLAGS ?=
MINUTES ?= 5
INPUTS ?= 100000
IMAGES ?= 10000
IMAGE ?= darkroom-server:latest
IMAGE_FLAGS ?=

PACKAGES := protos client server
LOWEST_TOOLS := buf-bin httpx2 hypothesis openai packaging pytest pytest-asyncio pytest-timeout pytest-xdist PyYAML trustme
# The servers that Darkroom is measured beside; each has an environment in bench/work.
PEERS := grpc litserve ray triton
# What `make test-gpu` needs besides the server's own packages.
GPU_TOOLS := hypothesis iniconfig packaging pluggy pygments pytest pytest-asyncio pytest-timeout sortedcontainers
DOWNLOAD = $(BIN)/python -m pip download -qq --disable-pip-version-check --no-deps \
    --only-binary :all: --dest build/wheels $(WHEELS_FLAGS)
TYPED := $(wildcard client/src server/src tests examples training bench tools)
NODE_MODULES := examples/node/node_modules/.installed

.PHONY: help
help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

# ---- use ----

.PHONY: setup
setup: $(SETUP) ## install everything into .venv (again only when a requirement changed)

.PHONY: demo
demo: setup ## start a server, generate images in every way into demo-output/, stop
	@$(BIN)/python examples/demo.py

.PHONY: serve
serve: setup ## serve the demo model on this machine, HTTP on port 8000; options in SERVE_FLAGS
	@exec $(BIN)/darkroom-server serve --http-port 8000 $(SERVE_FLAGS)

# ---- check ----

.PHONY: test test-tools
test: export HF_HUB_OFFLINE := 1
test: setup ## run the tests: no network, no GPU; options in PYTEST_FLAGS
	@tools/test_tools.sh $(INSTALL_TEST_TOOLS)
	@! command -v npm >/dev/null || $(MAKE) --no-print-directory $(NODE_MODULES)
	@$(BIN)/pytest $(PARALLEL) $(PYTEST_FLAGS)

test-tools: ## install promtool, Prometheus, Node and Chromium for the tests, by apt; needs root
	@tools/test_tools.sh yes

# Only files with such tests are collected: the others may import what is not there. Without
# build/quantizers, which `make test-quantized` makes, those of quantised weights are skipped.
.PHONY: test-gpu
test-gpu: export PYTHONPATH := build/quantizers:$(PYTHONPATH)
test-gpu: setup ## run the tests that need a CUDA device; SETUP= BIN=FOLDER installs nothing
	@$(BIN)/python -m pytest -m gpu $(PYTEST_FLAGS) \
	    $$(grep -rl --include='test_*.py' 'mark\.gpu' tests | sort)

.PHONY: test-compile
test-compile: setup ## compile the demo model's denoiser and compare images, a minute or two
	@$(BIN)/pytest tests/engine -m compile $(PYTEST_FLAGS)

# Apart from .venv: whenever they are there, diffusers imports them, which takes seconds at each start.
.PHONY: test-quantized
test-quantized: setup ## run the tests that need torchao and gguf, which it installs into build/quantizers
	@[ -d build/quantizers ] || $(BIN)/python $(PIP_INSTALL) --no-deps --target build/quantizers \
	    torchao==0.18.0 gguf==0.19.0
	@PYTHONPATH=build/quantizers $(BIN)/pytest tests/engine/test_quantizers.py -m quantized $(PYTEST_FLAGS)

.PHONY: test-packaging
test-packaging: setup ## build the wheels, install them into empty environments, try them there
	@$(BIN)/pytest tests/packaging -m "not gpu and not compile and not quantized" $(PYTEST_FLAGS)

.PHONY: test-lowest
test-lowest: .venv-lowest/.installed ## run LOWEST_TESTS with the lowest version of each dependency, but torch's
	@# Old versions of libraries call what other libraries have deprecated since.
	@HF_HUB_OFFLINE=1 .venv-lowest/bin/python -m pytest -W ignore::DeprecationWarning \
	    $(PARALLEL) $(LOWEST_TESTS) $(PYTEST_FLAGS)

.PHONY: test-compat
test-compat: setup ## run clients and servers of 0.1.0 and of this checkout against each other
	@$(BIN)/pytest tests/compat $(PYTEST_FLAGS)

.PHONY: bench-engine
bench-engine: setup ## measure the engine beside diffusers' pipeline, on this machine; options in BENCH_FLAGS
	@$(BIN)/python -m bench.engine $(BENCH_FLAGS)

.PHONY: bench-lora
bench-lora: setup ## measure rows with different LoRAs beside grouping by adapter; options in BENCH_FLAGS
	@$(BIN)/python -m bench.engine.loras loras $(BENCH_FLAGS)

.PHONY: bench-memory
bench-memory: setup ## measure seconds and memory of each preset on the real SD 1.4 (needs CUDA)
	@$(BIN)/python -m bench.micro memory $(BENCH_FLAGS)

.PHONY: bench-estimates bench-overload bench-http bench-ledger bench-fleet
bench-estimates: setup ## measure how good the server's estimates are; options in BENCH_FLAGS
	@$(BIN)/python -m bench.serving estimates $(BENCH_FLAGS)

bench-overload: setup ## 200 callers at five times the capacity, each with a deadline; options in BENCH_FLAGS
	@$(BIN)/python -m bench.serving overload $(BENCH_FLAGS)

bench-http: setup ## measure HTTP beside gRPC, and what idle streams cost; options in BENCH_FLAGS
	@$(BIN)/python -m bench.serving http $(BENCH_FLAGS)

bench-ledger: setup ## measure what accepted jobs cost in memory and in SQLite; options in BENCH_FLAGS
	@$(BIN)/python -m bench.serving ledger $(BENCH_FLAGS)

bench-fleet: setup ## measure what a fleet asks of PostgreSQL, and its cancels; options in BENCH_FLAGS
	@$(BIN)/python -m bench.serving fleet cancels $(BENCH_FLAGS)

.PHONY: cards
cards: setup ## count which models fit which card, on the meta device, and write docs/cards.md
	@$(BIN)/python -m bench.cards

.PHONY: bench-trace
bench-trace: setup bench/work/ray/.installed bench/work/triton/.installed ## a production trace with many models, simulated and served: hours; options in BENCH_FLAGS
	@$(BIN)/python -m bench.trace trace trace_served $(BENCH_FLAGS)

.PHONY: bench bench-full bench-gpu bench-peers-setup
bench: bench-peers-setup ## measure Darkroom beside other servers, 15 minutes; options in BENCH_FLAGS
	@$(BIN)/python -m bench.peers $(BENCH_FLAGS)

bench-full: bench-peers-setup ## the same with every load, three times: hours
	@$(BIN)/python -m bench.peers --full $(BENCH_FLAGS)

bench-gpu: setup ## ten minutes on a GPU: correctness, steps, memory, load, faults; options in BENCH_FLAGS
	@$(BIN)/python -m bench.gpu $(BENCH_FLAGS)

# What torch needs comes with torch.
.PHONY: bench-gpu-wheels
bench-gpu-wheels: wheels ## collect what bench-gpu and test-gpu need besides torch into build/wheels
	@rm -rf build/wheels && mkdir -p build/wheels && cp dist/*.whl build/wheels
	@$(DOWNLOAD) -r deploy/requirements/server.txt
	@$(DOWNLOAD) -c constraints.txt $(GPU_TOOLS)
	@du -sh build/wheels

bench-peers-setup: setup $(PEERS:%=bench/work/%/.installed) ## install the other servers, each into its own environment

.PHONY: observe
observe: setup ## a server, a real Prometheus and a short load: rules and plots, into observe-output/
	@$(BIN)/python -m tools.observe $(OBSERVE_FLAGS)

.PHONY: soak
soak: setup ## mixed load with random cancels and kills, for MINUTES
	@$(BIN)/python -m tests.faults.soak --minutes $(MINUTES)

.PHONY: model-chaos
model-chaos: setup ## 1,000 random loads and unloads under load, ten minutes; options in CHAOS_FLAGS
	@$(BIN)/python -m tests.faults.model_chaos $(CHAOS_FLAGS)

.PHONY: fleet fleet-chaos fleet-upgrade
fleet: setup ## three servers on one PostgreSQL, a load, one kill -9: nothing is lost; options in FLEET_FLAGS
	@$(BIN)/python -m tools.fleet $(FLEET_FLAGS)

fleet-chaos: setup ## 200 jobs, 20 whole servers killed, frozen or cut off; options in FLEET_FLAGS
	@$(BIN)/python -m tests.faults.fleet_chaos $(FLEET_FLAGS)

fleet-upgrade: setup ## three servers replaced in turn under load by wheels of another version, and back
	@$(BIN)/python -m tests.compat.fleet_upgrade $(FLEET_FLAGS)

.PHONY: start-noise
start-noise: setup ## start on a busy machine ten times, compare what was chosen; options in NOISE_FLAGS
	@$(BIN)/python -m tools.start_noise $(NOISE_FLAGS)

.PHONY: fuzz
fuzz: setup ## send INPUTS requests that no client would send to a server, over gRPC and HTTP each
	@$(BIN)/python -m tests.server.hostile.fuzz --inputs $(INPUTS)
	@$(BIN)/python -m tests.server.hostile.http_fuzz --inputs $(INPUTS)

.PHONY: fuzz-images
fuzz-images: setup ## decode IMAGES damaged pictures in the server's image workers
	@$(BIN)/python -m tests.server.uploads.fuzz --inputs $(IMAGES)

.PHONY: trace-request
trace-request: setup ## trace one request through server and client; TRACE_FLAGS=--check holds the limits
	@$(BIN)/python -m tools.trace_request $(TRACE_FLAGS)

.PHONY: train-adapters judge-adapters
train-adapters: setup ## train the demo model's adapters, minutes on two cores; options in TRAIN_FLAGS
	@$(BIN)/python -m training.adapters.train build/demo_adapters $(TRAIN_FLAGS)

judge-adapters: setup ## judge them, and tasks with images, on 50 held-out prompts each; options in JUDGE_FLAGS
	@$(BIN)/python -m training.adapters.evaluate build/demo_adapters $(JUDGE_FLAGS)

# They run two at a time, the longest first.
CHECKS := lint-mypy lint-pyright lint-trace lint-words lint-imports lint-stubs lint-python lint-format lint-protos lint-breaking

.PHONY: lint
lint: setup $(GENERATOR)/.installed ## check style, types, imports and protos
	@failed=$$(mktemp); trap 'rm -f "$$failed"' EXIT; \
	$(MAKE) --no-print-directory -j2 --output-sync=recurse FAILED="$$failed" $(CHECKS:%=noted-%); \
	[ ! -s "$$failed" ] || { echo "lint: failed:" $$(sort "$$failed"); exit 1; }

# Run a check, and note in the file FAILED if it fails, so that the others go on.
noted-%:
	@echo "== $*"
	@$(MAKE) --no-print-directory $* || echo $* >>"$(FAILED)"

.PHONY: types
types: lint-mypy lint-pyright ## check types only

.PHONY: lint-mypy lint-pyright
lint-mypy: setup
	@$(BIN)/mypy $(TYPED)

lint-pyright: setup
	@$(BIN)/basedpyright --level error

.PHONY: lint-python lint-format lint-imports lint-protos lint-breaking lint-stubs
lint-python: setup
	@$(BIN)/ruff check --output-format concise

lint-format: setup
	@$(BIN)/ruff format --check || { echo "'make format' fixes this"; exit 1; }

lint-imports: setup
	@$(BIN)/lint-imports --no-logo

lint-protos: setup
	@$(BIN)/buf lint protos
	@$(BIN)/buf format --diff --exit-code protos || { echo "'make format' fixes this"; exit 1; }

# The baseline holds the protos of 0.1.0: `buf build protos --exclude-source-info -o ...` at that
# commit. A release that may break replaces it.
lint-breaking: setup
	@$(BIN)/buf breaking protos --against protos/baseline.binpb

lint-stubs: $(GENERATOR)/.installed
	@generated=$$(mktemp -d); trap 'rm -rf "$$generated"' EXIT; \
	$(call generate,"$$generated"); \
	diff -rq -x __init__.py -x __pycache__ -x py.typed protos/src "$$generated" \
	    || { echo "the stubs differ from the protos: 'make protos' fixes this"; exit 1; }

.PHONY: lint-words
lint-words: setup ## find words that the prose avoids; WORDS_FLAGS may name files, or be --count
	@$(BIN)/python -m tools.lint_words $(WORDS_FLAGS)

.PHONY: lint-trace
lint-trace: setup
	@$(BIN)/python -m tools.trace_request --quiet --check

.PHONY: format
format: setup ## format the Python files and the protos, sort the imports
	@$(BIN)/ruff check --quiet --select I --fix
	@$(BIN)/ruff format
	@$(BIN)/buf format --write protos

# ---- build ----

.PHONY: protos
protos: $(GENERATOR)/.installed ## generate the Python stubs from the protos
	@$(call generate,protos/src)

# $(1): the folder that the generated files go to
generate = $(GENERATOR)/python -m grpc_tools.protoc -I protos \
    --plugin=protoc-gen-mypy=$(GENERATOR)/protoc-gen-mypy \
    --plugin=protoc-gen-mypy_grpc=$(GENERATOR)/protoc-gen-mypy_grpc \
    --python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) \
    $(wildcard protos/darkroom/v1/*.proto protos/darkroom/ledger/v1/*.proto)

.PHONY: wheels
wheels: setup ## build wheels and source distributions into dist/
	@rm -rf dist && mkdir dist
	@for package in $(PACKAGES); do \
	    log=$$($(BIN)/python -m build --no-isolation --outdir dist "$$package" 2>&1) \
	        || { echo "$$log"; exit 1; }; \
	done
	@ls -sh dist

.PHONY: image
image: ## build the container image with docker or buildah; options in IMAGE_FLAGS
	@if docker info >/dev/null 2>&1; then \
	    docker build $(IMAGE_FLAGS) -t $(IMAGE) .; \
	elif command -v buildah >/dev/null; then \
	    buildah bud --format docker $(IMAGE_FLAGS) -t $(IMAGE) .; \
	else \
	    echo "needs docker with a running daemon, or buildah"; exit 1; \
	fi

.PHONY: constraints
constraints: setup ## write constraints.txt again from what .venv holds, after an upgrade there
	@pins=$$($(BIN)/python -m pip freeze --exclude-editable --all | sed -E '/^pip==/d; s/\+.*//' \
	    | LC_ALL=C sort -f); \
	comment=$$(sed -n '/^#/p' constraints.txt); \
	printf '%s\n' "$$comment" "$$pins" >constraints.txt

PIP_COMPILE = .venv-lock/bin/pip-compile --generate-hashes --strip-extras --no-header \
    --no-annotate --no-emit-options --unsafe-package torch --constraint constraints.txt

# pip-compile ends its output with an empty line and a warning about torch.
.PHONY: lock
lock: setup .venv-lock/.installed ## write the container's packages again, with hashes, from constraints.txt
	@$(BIN)/python -m tools.declared_requirements >.venv-lock/server.in
	@echo hatchling >.venv-lock/build.in
	@for name in server build; do \
	    lock=deploy/requirements/$$name.txt; resolved=.venv-lock/$$name.txt; \
	    log=$$($(PIP_COMPILE) --output-file "$$resolved" ".venv-lock/$$name.in" 2>&1) \
	        || { echo "$$log"; exit 1; }; \
	    comment=$$(sed -n '/^#/p' "$$lock"); \
	    { printf '%s\n' "$$comment"; sed '/^$$/,$$d' "$$resolved"; } >"$$resolved.new"; \
	    mv "$$resolved.new" "$$lock"; \
	done

.PHONY: clean
clean: ## delete what was built, the environments too
	@rm -rf .venv .venv-protos .venv-lock .venv-lowest bench/work build dist demo-output observe-output examples/node/node_modules
	@rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# ---- environments ----

# The build backend comes first and from our constraints: pip would fetch the newest one otherwise.
.venv/.installed: constraints.txt requirements-dev.txt requirements-bench.txt $(PACKAGES:=/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("needs Python 3.11 or newer")'
	@[ -x $(BIN)/python ] || { echo "making .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing into .venv"
	@$(BIN)/python $(PIP_INSTALL) -c constraints.txt -r requirements-dev.txt
	@$(BIN)/python $(PIP_INSTALL) -c constraints.txt --no-build-isolation \
	    -e protos -e 'client[cli,pil,numpy]' -e 'server[fleet,http,otel,prompt-weights]'
	@touch $@

# numpy's lowest version has no wheel for a Python newer than 3.12.
.venv-lowest/.installed: .venv/.installed tools/lowest_versions.py constraints.txt $(PACKAGES:=/pyproject.toml)
	@[ -x .venv-lowest/bin/python ] || $(PYTHON) -m venv .venv-lowest
	@$(BIN)/python -m tools.lowest_versions >.venv-lowest/constraints.txt
	@echo "installing into .venv-lowest"
	@.venv-lowest/bin/python $(PIP_INSTALL) -c .venv-lowest/constraints.txt $(LOWEST_TOOLS) \
	    -e protos -e 'client[cli,pil,numpy]' -e 'server[fleet,http,otel,prompt-weights]'
	@touch $@

.venv-lock/.installed:
	@[ -x .venv-lock/bin/python ] || $(PYTHON) -m venv .venv-lock
	@.venv-lock/bin/python $(PIP_INSTALL) pip-tools==7.6.2
	@touch $@

$(GENERATOR)/.installed: protos/requirements-generate.txt
	@[ -x $(GENERATOR)/python ] || { echo "making .venv-protos"; $(PYTHON) -m venv .venv-protos; }
	@$(GENERATOR)/python $(PIP_INSTALL) -r $<
	@touch $@

# nvidia-pytriton brings a server that is linked against the system's own Python.
bench/work/triton/.installed: PYTHON := /usr/bin/python3
bench/work/%/.installed: bench/peers/requirements/%.txt
	@mkdir -p bench/work
	@[ -x bench/work/$*/bin/python ] || $(PYTHON) -m venv bench/work/$* \
	    || { echo "needs $(PYTHON) with venv"; exit 1; }
	@echo "installing into bench/work/$*"
	@bench/work/$*/bin/python $(PIP_INSTALL) -r $<
	@touch $@

$(NODE_MODULES): examples/node/package-lock.json
	@npm ci --prefix examples/node --silent --no-audit --no-fund
	@touch $@
