# make demo     the whole kit on synthetic songs, offline, two minutes after the install
# make test     the tests
# make deam     the published configuration on DEAM itself: network, and a GPU to be done today
# make folds    ten-fold cross-validation of the heads alone, on the features of `make deam`
# make record   check a run and pack it for others to check: make record RUN=runs/last1
# make lock     requirements.in → requirements.txt, for every platform and Python: network
# make check-lock   that it would install on each of them: network, several GB, four minutes

# `make PYTHON=/path/to/python demo` takes that one instead of the newest on PATH.
PYTHON ?=
PYTHONS = python3.13 python3.12 python3.11
RUN ?= runs/last1
PY = .venv/bin/python

# Each is run, not only looked up: a version manager's shim may have nothing behind it, and Debian
# ships Pythons without ensurepip, with which no environment can be made.
TRY = import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
FOUND = $(shell for p in $(if $(PYTHON),"$(PYTHON)",$(PYTHONS)); do \
	"$$p" -c '$(TRY)' >/dev/null 2>&1 && echo "$$p" && break; done)
TRIED = $(if $(PYTHON),$(PYTHON) is not one,none of $(PYTHONS) runs)
CHOSEN = $(or $(FOUND),$(error error: Python 3.13, 3.12 or 3.11 with venv is needed, and \
	$(TRIED): make PYTHON=/path/to/python $(MAKECMDGOALS)))

.PHONY: demo test deam folds record lock check-lock

# By its full path, which may hold spaces. demo.sh calls `python`: in the image there is no .venv.
demo: .venv/ready
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash tests/demo.sh

test: .venv/ready
	$(PY) -m pytest tests

deam: .venv/ready
	$(PY) extract.py --weights ALM/wav2vec2-base-audioset
	$(PY) train.py --finetune last1 --resume
	$(PY) eval.py runs/last1

folds: .venv/ready
	for fold in 0 1 2 3 4 5 6 7 8 9; do \
		$(PY) train.py --finetune frozen --fold $$fold --resume || exit; done
	$(PY) eval.py runs/frozen-fold*

record: .venv/ready
	$(PY) verify.py "$(RUN)" --features DEAM_feats --pack "$(notdir $(RUN)).tar"

# The marker is written last: an install cut short is done again. From nothing (--clear), so that
# the lock is all that is in there, and no other Python's packages.
.venv/ready: requirements.txt
	"$(CHOSEN)" -m venv --clear .venv
	$(PY) -m pip install --quiet --require-hashes --requirement requirements.txt
	touch .venv/ready

# --python-version is the oldest Python of the lock; "fewest" means one version of a package for
# all, so that every Python computes with the same code.
lock:
	"$(CHOSEN)" -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install --quiet uv
	.venv-lock/bin/python -m uv pip compile --quiet --universal --python-version 3.11 \
		--fork-strategy fewest --generate-hashes --no-header --no-emit-index-url \
		--no-emit-find-links --output-file requirements.txt requirements.in
	rm -rf .venv-lock

# The newest pip, because an older one does not know newer platform tags.
check-lock:
	"$(CHOSEN)" -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install --quiet --upgrade pip packaging
	.venv-lock/bin/python tests/lock.py
	rm -rf .venv-lock
