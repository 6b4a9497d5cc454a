# make train: set up, prepare CIFAR-10, train ResNet-20. make test: lint, then every test.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# A CPU that has to emulate bfloat16 trains many times slower in it than in float32.
EMULATES := from tf_largebatch.training.environment import emulates
DTYPE = $(shell $(RUN) -c "$(EMULATES); print('float32' if emulates('bfloat16') else 'bfloat16')")

# Tests start many processes, and with this variable each would compile TensorFlow's modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test lint

train: $(VENV)/.installed
	$(RUN) -m tools.prepare_data cifar10 --data_dir=data
	$(RUN) -m tf_largebatch.train --flagfile=flags/cifar10_resnet20.flags --dtype=$(DTYPE) \
	  --data_dir=data --work_dir=runs/cifar10_resnet20

test: lint
	$(RUN) -m pytest -q --numprocesses=2 --dist=loadgroup

lint: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --no-compile --requirement requirements.txt
	touch $@
