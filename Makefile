# make demo   the whole kit on synthetic songs, offline, about a minute after the install
# make test   the tests
# make deam   the published configuration on DEAM itself: needs the network and, to be done today, a GPU
# make lock   requirements.in → requirements.txt

PYTHON ?= $(shell command -v python3.11 || command -v python3)
RUN = .venv/bin/python

.PHONY: demo test deam lock

demo: .venv/ready
	rm -rf demo
	$(RUN) extract.py --deam demo --features demo/DEAM_feats --precision float64 --store float16
	$(RUN) train.py --finetune last1 --features demo/DEAM_feats --run demo/run --precision float64 --batch-size 8 --epochs 30 --step-size-up 50 --micro-batch 8 --device cpu
	$(RUN) eval.py demo/run --features demo/DEAM_feats --verify tests/golden/demo.json

test: .venv/ready
	$(RUN) -m pytest tests

deam: .venv/ready
	$(RUN) extract.py
	$(RUN) train.py --finetune last1 --resume
	$(RUN) eval.py runs/last1

# The lock is for Python 3.11. The marker is written last: an install cut short is done again.
.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "error: Python 3.11 is needed: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --require-hashes --requirement requirements.txt
	touch .venv/ready

lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet pip-tools
	.venv-lock/bin/python -m piptools compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-header \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --output-file requirements.txt requirements.in
	rm -rf .venv-lock
