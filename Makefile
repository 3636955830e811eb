# make demo    train on real handwritten digits and draw some (minutes, two cores)
# make test    lint and the whole test suite
# make coverage    which lines the tests run (a third slower)
# make soak    kill training runs 300 times at random moments (at most half an hour)
# make benchmark    measure speed and memory (an hour or more; on a machine that does nothing else)
# make benchmark-samplers    quality of the demo's samples by sampler and evaluations (an hour or more; resumable)
# make compatibility    the fast tests on the newest versions and on the oldest that pyproject.toml claims (downloads 6 GB)
# make reproduce    the paper's claims at small scale (about 100 minutes on two cores; resumable); QUICK=1 only checks that it runs
# make clean   forget the demo's results; the environment in .venv stays

PYTHON ?= python3
OLDEST_PYTHON ?= python3.10
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# a third process works while others wait
PARALLEL := --numprocesses 3 --dist loadfile --no-loadscope-reorder
FAST := $(PARALLEL) -m "not slow"

# the demo's model: 1.2 million parameters; what samples from it reads these flags from its config.json
DIGITS := --image_size 16 --image_channels 1 --class_cond True --num_classes 10 \
	--num_channels 32 --channel_mult 1,2,2 --num_res_blocks 1 --attention_resolutions 8 \
	--learn_sigma True --noise_schedule cosine
LAST_DIGIT := demo/digits/8_01796.png
WEIGHTS := demo/run/ema_0.99_001000.pt
SAMPLES := demo/samples/samples_500x16x16x1.npz

.PHONY: demo reproduce test coverage soak lint benchmark benchmark-digits benchmark-samplers compatibility clean

demo: demo/progress.png $(SAMPLES)
	@echo "How it learned: $(CURDIR)/demo/progress.png"
	@echo "Its handwriting, a row for each digit: $(CURDIR)/$(SAMPLES:.npz=.png)"

$(SAMPLES): $(WEIGHTS)
	$(PY) scripts/image_sample.py --model_path $(WEIGHTS) --log_dir demo/samples \
		--classes 0,1,2,3,4,5,6,7,8,9 --num_samples 500 --batch_size 100 --sampler dpm++2m-sde --sampling_steps 20 --seed 0

demo/progress.png: $(WEIGHTS)
	$(PY) scripts/plot_progress.py demo/run --out $@

$(WEIGHTS): $(LAST_DIGIT)
	$(PY) scripts/image_train.py $(DIGITS) --data_dir demo/digits --log_dir demo/run --resume_checkpoint auto \
		--batch_size 32 --lr 2e-3 --lr_anneal_steps 1000 --ema_rate 0.99 --save_interval 500 --log_interval 100 --seed 0
	@touch -c $@ && test -f $@ || { echo "the training stopped early; make demo continues it, make clean forgets it"; exit 1; }

$(LAST_DIGIT): .venv/demo
	$(PY) scripts/prepare.py digits demo/digits

benchmark: .venv/demo
	$(PY) benchmarks/run.py all

benchmark-digits: $(SAMPLES)
	$(PY) benchmarks/digits.py $(SAMPLES) demo/digits

benchmark-samplers: $(WEIGHTS)
	$(PY) benchmarks/run.py samplers

reproduce: .venv/reproduce
	$(PY) -m reproduce.runner $(if $(QUICK),--quick)

test: lint
	$(PY) -m pytest $(PARALLEL)

coverage: .venv/test
	$(PY) -m pytest $(PARALLEL) --ignore tests/faults --cov --cov-report=term --cov-fail-under=90

soak: .venv/test
	$(PY) tests/faults/soak.py

lint: .venv/test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

compatibility: .venv-newest/test .venv-oldest/test
	.venv-newest/bin/python -m pytest $(FAST)
	.venv-oldest/bin/python -m pytest $(FAST)

.venv-newest/test: pyproject.toml
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --editable ".[test]"
	touch $@

.venv-oldest/test: pyproject.toml constraints-oldest.txt
	$(OLDEST_PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[test]"
	touch $@

# .venv/NAME marks that the extra NAME is installed
.venv/demo .venv/reproduce .venv/test: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable ".[$(@F)]"
	touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv

clean:
	rm -rf demo
