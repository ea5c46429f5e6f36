# Every target does its own set-up: a virtual environment of the project's own, from pinned constraints.

PYTHON ?= python3.11
VENV := .venv
COMPAT := .venv-compat
NEWEST := .venv-newest
OLDEST := .venv-oldest
BARE := .venv-python
OPTIMUM := .venv-optimum
BROWSER := .venv-browser
HARNESS := .venv-lm-eval
DOCS := .venv-docs
AUDIT := .venv-audit
VLLM := .venv-vllm
GGUF := .venv-gguf
BIN := $(VENV)/bin
PIP_FLAGS := --quiet --disable-pip-version-check
# Two test processes: as many as the smallest machine that this is meant for has cores.
WORKERS ?= 2

.PHONY: demo demo-llm test test-whole audit test-compat test-oldest test-pythons test-optimum test-vllm test-gguf test-runtimes test-browser screenshots fuzz test-kills test-wheel test-shapes test-lm-eval generated docs lint format train bench-compile bench-prepare bench-trimming \
	bench-quality bench-slice bench-onnx bench-gguf bench-bench bench-build bench-budgets bench-floors bench-replies bench-nested bench-packages bench-scores bench-real bench-repairs bench-experts bench-rounding bench-recognition bench-large clean

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[dev]'
	touch $@

$(COMPAT)/.done: constraints-compat.txt
	$(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/pip install $(PIP_FLAGS) --requirement constraints-compat.txt
	touch $@

demo: $(VENV)/.done  ## Build, export, verify and benchmark on the embedded model.
	$(BIN)/sspcompile build --scenario chemistry-helpdesk --overwrite
	$(BIN)/sspcompile export --overwrite
	$(BIN)/sspcompile bench --quick

demo-llm: $(VENV)/.done  ## The same on a real model of 135 M parameters, which it brings first (about 20 minutes).
	$(BIN)/python -m benchmarks.smollm2 SmolLM2-135M-Instruct
	$(BIN)/sspcompile build --scenario homework-tutor --model ./SmolLM2-135M-Instruct --overwrite
	$(BIN)/sspcompile bench --quick

test: $(VENV)/.done lint  ## The suite: no network beyond the package registries, no GPU.
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow and not whole"

test-whole: $(VENV)/.done  ## Whole paths of users: every command of the README, sweeps, torchrun, the example in Python.
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m whole

$(AUDIT)/.done:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/pip install $(PIP_FLAGS) pip-audit==2.10.1
	touch $@

audit: $(VENV)/.done $(AUDIT)/.done  ## Do the pinned dependencies agree, and has one of them a known vulnerability?
	$(BIN)/pip check
	$(AUDIT)/bin/python .ci/audit.py

$(NEWEST)/.done: constraints-newest.txt
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install $(PIP_FLAGS) --requirement constraints-newest.txt
	touch $@

LOADS = COMPAT_FIXTURES=$(COMPAT)/fixtures COMPAT_CONSTRAINTS=constraints-$(2).txt \
    $(1)/bin/python -P -m pytest --confcutdir tests/compat tests/compat

test-compat: $(VENV)/.done $(COMPAT)/.done $(NEWEST)/.done  ## What is written, loaded by transformers 4.57 and by the newest.
	$(BIN)/python tests/compat/write.py $(COMPAT)/fixtures
	$(call LOADS,$(COMPAT),compat)
	$(call LOADS,$(NEWEST),newest)

$(VLLM)/.done: constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install $(PIP_FLAGS) --requirement constraints-vllm.txt
	# Their wheels are for CUDA, do not load beside torch for the CPU, and no text needs them.
	$(VLLM)/bin/pip uninstall $(PIP_FLAGS) --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: $(VENV)/.done $(VLLM)/.done  ## Cuts of both layouts in vLLM, offline on the CPU: the same greedy tokens.
	$(BIN)/python tests/vllm/write.py $(VLLM)/fixtures
	set -e; for case in $(VLLM)/fixtures/*; do VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 $(VLLM)/bin/python tests/vllm/check.py $$case; done

# llama.cpp is compiled here (a quarter of an hour on two cores), without what its binding has no use for, and without the
# AMX code of its 0.3.36, which dies of an illegal instruction where a compiler drops the tile configuration it sets up.
WITHOUT_AMX := $(if $(filter x86_64,$(shell uname -m)),-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)

$(GGUF)/.done: pyproject.toml constraints.txt constraints-gguf.txt
	$(PYTHON) -m venv $(GGUF)
	CFLAGS="$(WITHOUT_AMX)" CXXFLAGS="$(WITHOUT_AMX)" CMAKE_BUILD_PARALLEL_LEVEL=$(WORKERS) CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
	    -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_COMMON=OFF" \
	    $(GGUF)/bin/pip install $(PIP_FLAGS) --no-cache-dir --constraint constraints.txt --constraint constraints-gguf.txt \
	    llama-cpp-python  # a wheel in pip's cache may be of another machine, or with AMX
	$(GGUF)/bin/pip install $(PIP_FLAGS) --constraint constraints.txt --constraint constraints-gguf.txt \
	    --editable '.[dev,gguf]'
	touch $@

test-gguf: $(GGUF)/.done  ## GGUF exports in llama.cpp, every family and layout that it holds: logits, text, tokens.
	$(GGUF)/bin/python -m pytest tests/test_gguf_llama.py -m slow

# Which environments; each has a file in benchmarks/results/runtimes, and those that are not run keep theirs.
ENVIRONMENTS ?= main compat oldest newest optimum gguf vllm
PLACE_main = $(VENV)
PLACE_compat = $(COMPAT)
PLACE_oldest = $(OLDEST)
PLACE_newest = $(NEWEST)
PLACE_optimum = $(OPTIMUM)
PLACE_gguf = $(GGUF)
PLACE_vllm = $(VLLM)

test-runtimes: $(VENV)/.done $(foreach name,$(ENVIRONMENTS),$(PLACE_$(name))/.done)  ## Families and layouts in every runtime; writes the table of docs/runtimes.md.
	$(BIN)/python tests/runtimes/write.py $(VENV)/runtimes
	set -e; for place in $(foreach name,$(ENVIRONMENTS),$(name):$(PLACE_$(name))); do \
	    VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 $${place#*:}/bin/python -P tests/runtimes/check.py $${place%%:*} $(VENV)/runtimes; \
	done
	$(BIN)/python tests/runtimes/page.py

$(OLDEST)/.done: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install $(PIP_FLAGS) --constraint constraints-oldest.txt --editable '.[cpu,genai]' \
	    pytest pytest-xdist hypothesis jsonschema
	touch $@

# What pydantic writes as a JSON schema is compared with the published ones in the main environment alone.
test-oldest: $(OLDEST)/.done  ## The lowest versions that pyproject.toml allows: writing, loading, exporting, building.
	$(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow" -k "not schemas and not up_to_date" \
	    $(addprefix tests/,test_light.py test_recipe.py test_report.py test_checkpoint.py test_loaded.py \
	    test_slicing_exact.py test_families.py test_placement.py test_repair.py test_export_onnx.py test_prepare_run.py \
	    test_malformed.py test_cli.py test_cli_slice.py)

# torch for these Pythons comes with gigabytes of CUDA libraries; what needs none runs without it.
PYTHONS ?= 3.12 3.13
# pyenv answers to these names only where their versions are switched on.
test-pythons: export PYENV_VERSION ?= $(shell pyenv versions --bare 2>/dev/null | grep -E '^3\.1[1-9]\.' | paste -sd:)

$(BARE)%/.done: constraints.txt
	python$* -m venv $(BARE)$*
	$(BARE)$*/bin/pip install $(PIP_FLAGS) --constraint constraints.txt numpy scipy pydantic click rich ruamel.yaml \
	    filelock safetensors huggingface_hub jinja2 psutil pytest hypothesis
	touch $@

test-pythons: $(PYTHONS:%=$(BARE)%/.done)  ## Other Pythons: everything compiles; commands that need no torch run.
	for python in $(PYTHONS:%=$(BARE)%/bin/python); do \
	    $$python -W error -m compileall -q -f sspcompile tests benchmarks && \
	    PYTHONPATH=$(CURDIR) $$python -P -m pytest --noconftest tests/test_light.py tests/test_recipe.py tests/test_scenario.py \
	        tests/test_domains.py tests/test_questions.py || exit; \
	done

$(OPTIMUM)/.done: constraints-optimum.txt
	$(PYTHON) -m venv $(OPTIMUM)
	$(OPTIMUM)/bin/pip install $(PIP_FLAGS) --requirement constraints-optimum.txt
	touch $@

test-optimum: $(VENV)/.done $(OPTIMUM)/.done  ## ONNX exports in optimum's ORTModelForCausalLM.
	$(BIN)/python tests/optimum/write.py $(OPTIMUM)/fixtures
	OPTIMUM_FIXTURES=$(OPTIMUM)/fixtures $(OPTIMUM)/bin/python -P -m pytest --confcutdir tests/optimum tests/optimum

$(BROWSER)/.done: constraints-browser.txt
	$(PYTHON) -m venv $(BROWSER)
	$(BROWSER)/bin/pip install $(PIP_FLAGS) --requirement constraints-browser.txt
	touch $@

test-browser: $(VENV)/.done $(BROWSER)/.done  ## Reports in headless Chromium (Debian: chromium), with axe.
	$(BIN)/python tests/browser/write.py $(BROWSER)/pages
	BROWSER_PAGES=$(BROWSER)/pages $(BROWSER)/bin/python -P -m pytest --confcutdir tests/browser tests/browser

# REPORT=artifacts/NAME/report.html takes the first picture of that build; `make demo-llm` made the README's.
export REPORT
screenshots: $(VENV)/.done $(BROWSER)/.done  ## The pictures of the README, of the embedded demo unless REPORT says so.
	$(BIN)/python tests/browser/write.py $(BROWSER)/pages
	SCREENSHOTS=docs/images BROWSER_PAGES=$(BROWSER)/pages $(BROWSER)/bin/python -P -m pytest -k screenshots \
	    --confcutdir tests/browser tests/browser

test-kills: $(VENV)/.done  ## Fifty kills at random moments, signals, full and read-only disks, two builds at once.
	$(BIN)/python -m pytest tests/test_kills.py tests/test_journal_build.py tests/test_surroundings.py -m slow -s

fuzz: $(VENV)/.done  ## Over a million executions of everything that reads files, coverage-guided (Linux, CPython 3.11).
	$(BIN)/pip install $(PIP_FLAGS) --constraint constraints.txt atheris
	$(BIN)/python -P tests/fuzz/campaign.py

test-wheel: $(VENV)/.done  ## The wheel in an empty environment, from another folder.
	$(BIN)/python -m pytest tests/test_wheel.py -m slow

test-shapes: $(VENV)/.done  ## Whole builds with the attention shapes of the paper's four models.
	$(BIN)/python -m pytest tests/test_paper_shapes.py -m slow

$(HARNESS)/.done: pyproject.toml constraints.txt constraints-lm-eval.txt
	$(PYTHON) -m venv $(HARNESS)
	$(HARNESS)/bin/pip install $(PIP_FLAGS) --constraint constraints.txt --constraint constraints-lm-eval.txt \
	    --editable '.[dev,eval]'
	touch $@

test-lm-eval: $(HARNESS)/.done  ## lm-evaluation-harness on an artifact, with a task that needs no download.
	$(HARNESS)/bin/python -m pytest tests/test_lm_eval.py -m slow

generated: $(VENV)/.done  ## What is written from definitions: keywords of the API, pages of options and scores, JSON schemas.
	$(BIN)/python -m sspcompile.request.page
	$(BIN)/python -m sspcompile.criteria.page > docs/criteria.md
	$(BIN)/python -m sspcompile.report.schema docs/schemas

$(DOCS)/.done: constraints-docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install $(PIP_FLAGS) --requirement constraints-docs.txt
	touch $@

docs: $(DOCS)/.done  ## The site, with the API reference, to site/: a dead link fails.
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --clean

lint: $(VENV)/.done  ## Rules, format and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

train: $(VENV)/.done  ## Train the embedded model again, and write its card, the domain pools and its questions.
	$(BIN)/python -m training.train --out sspcompile/embedded/model
	$(BIN)/python -m training.card
	$(BIN)/python -m training.pools
	$(BIN)/python -m training.questions

bench-quality: $(VENV)/.done  ## Quality at a given size: every head score, both layouts, with and without repair.
	$(BIN)/python -m benchmarks.quality
	$(BIN)/python -m benchmarks.quality_tables

bench-compile: $(VENV)/.done  ## How long compiling a scenario takes once everything is loaded.
	$(BIN)/python benchmarks/compile.py

# A hub name or a folder, and questions with answers, {"question": ..., "answer": ...} a line (GSM8K has this form).
MODEL ?= HuggingFaceTB/SmolLM2-135M-Instruct
QUESTIONS ?= train.jsonl
JUDGE ?= test.jsonl

bench-build: $(VENV)/.done  ## What builds of a real model cost: passes, minutes, memory, and what was lost.
	$(BIN)/python -m benchmarks.build --model $(MODEL) --questions $(QUESTIONS) --judge $(JUDGE) --busy 1

bench-budgets: $(VENV)/.done  ## Whole builds by budget, unit and layout: what is lost, and how fast the cut is.
	$(BIN)/python -m benchmarks.budgets --model $(MODEL) --questions $(QUESTIONS) --judge $(JUDGE) --speed size-0.7

bench-floors: $(VENV)/.done  ## Whether builds hold the bound on the loss that they were given, on texts that they never saw.
	$(BIN)/python -m benchmarks.floors --model $(MODEL) --data $(DATA) --fine word-problems

bench-replies: $(VENV)/.done  ## How many tokens the dense model should write behind prompts without answers.
	$(BIN)/python -m benchmarks.replies --model $(MODEL) --data $(DATA)

bench-trimming: $(VENV)/.done  ## A trimmed vocabulary: sizes and losses, and beside cuts of the same size.
	$(BIN)/python -m benchmarks.trimming --model $(MODEL) --questions $(QUESTIONS) --judge $(JUDGE)

bench-nested: $(VENV)/.done  ## A nested artifact of a real model beside builds of one size: losses, bytes, switches, a draft.
	$(BIN)/python -m benchmarks.nested --model $(MODEL) --questions $(QUESTIONS) --judge $(JUDGE)

bench-scores: $(VENV)/.done  ## Masks of a real model by several scores, repaired alike, judged on unseen texts.
	$(BIN)/python -m benchmarks.scores --model $(MODEL) --questions $(QUESTIONS) --judge $(JUDGE)
	$(BIN)/python -m benchmarks.scores --model $(MODEL) --questions $(QUESTIONS) --judge $(JUDGE) --per-layer --prompts 32 \
		--judged 16 --scores tyr,dlp,obs,fisher,wanda,flap --tilted obs --out benchmarks/results/scores-published.json

# A folder of public sets: gsm8k, openstax, squad2, tatqa, banking77, wikitext2, mmlu, xdomainbench.
DATA ?= data

bench-real: $(VENV)/.done  ## Own scenario against others on a real model: scores, published pruners, budgets, layouts, repairs.
	$(BIN)/python -m benchmarks.real --model $(MODEL) --data $(DATA)

bench-packages: $(VENV)/.done  ## Pruners of the package index as they are installed, at equal sizes.
	$(BIN)/pip install $(PIP_FLAGS) --no-deps optipfair==0.4.2
	$(BIN)/python -m benchmarks.packages --model $(MODEL) --data $(DATA)

bench-repairs: $(VENV)/.done  ## How firmly a repair holds weights, and what late layers cost more than early ones.
	$(BIN)/python -m benchmarks.repairs --model $(MODEL) --data $(DATA) --ridges 0.03/0.03,0.3/1,1/1 --tilts 0,1

bench-experts: $(VENV)/.done  ## Narrower experts, no repair against the whole one (o_proj too), in small mixtures trained for it.
	$(BIN)/python -m benchmarks.experts

bench-rounding: $(VENV)/.done  ## What a cut is worth next to int8 and int4, and on top of them, byte by byte.
	$(BIN)/python -m benchmarks.rounding --model $(MODEL) --data $(DATA)

bench-recognition: $(VENV)/.done  ## Whether the mixture names real prompts and descriptions right.
	$(BIN)/python -m benchmarks.recognition --model $(MODEL) --data $(DATA)

bench-large: $(VENV)/.done  ## Builds of random models that do not fit. TOKENIZER: a folder with a tokenizer.
	$(BIN)/python -m benchmarks.large --tokenizer $(TOKENIZER) --shape 1.2b --memory 6GB
	$(BIN)/python -m benchmarks.large --tokenizer $(TOKENIZER) --shape 7b --memory 12GB

bench-bench: $(VENV)/.done  ## Whether `bench` repeats itself and tells a model from itself.
	$(BIN)/python -m benchmarks.bench

# FOLDERS: model folders; of a build, its model.
FOLDERS ?= SmolLM2-135M-Instruct

bench-gguf: $(GGUF)/.done  ## GGUF exports against cp, and llama.cpp's text against transformers'.
	$(GGUF)/bin/python -m benchmarks.gguf $(FOLDERS) --types f32,f16,bf16,q8_0,q4_0,q4_k_m

bench-onnx: $(VENV)/.done  ## ONNX exports against transformers and onnxruntime-genai's own builder.
	$(BIN)/python -m benchmarks.onnx

bench-slice: $(VENV)/.done  ## What cutting a checkpoint costs against copying what it writes.
	$(BIN)/python benchmarks/slice.py

bench-prepare: $(VENV)/.done  ## What learning a model costs, in bare forward passes over the same tokens.
	$(BIN)/python benchmarks/prepare.py

clean:
	rm -rf $(VENV) $(COMPAT) $(NEWEST) $(OLDEST) $(BARE)* $(OPTIMUM) $(HARNESS) $(GGUF) $(DOCS) site build dist .pytest_cache .ruff_cache .hypothesis
