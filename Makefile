# Two commands do all the set-up on a fresh machine: `make train` (the main job) and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RECIPE ?= digits
# Recipes whose data need no download.
MADE_HERE := digits digits_dvs
MONITOR_PORT ?= 9095
BENCHMARKS := loader augmentation shard_writing train_step neuron_bytes chi_overhead attach_cost engine checkpoint_stall scrape scale
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt

.PHONY: train test test-faults test-deploy check monitor bench clean

train: $(VENV)/installed $(if $(filter $(RECIPE),$(MADE_HERE)),data/$(RECIPE)/val/manifest.json) ## train the digits, from shards to report, or with RECIPE=digits_dvs the digits as event data; ARGS are options of launch/train.py
	$(BIN)/python -m launch.local --recipe $(RECIPE) $(ARGS)

data/%/val/manifest.json: | $(VENV)/installed
	$(BIN)/python -m data_prep $* data/$*

test: $(VENV)/installed-dev ## the tests that every change must pass
	$(BIN)/python -m pytest -m "not faults and not deploy" $(ARGS)

test-faults: $(VENV)/installed-dev ## the long fault and matrix tests; their log is build/faults.log
	@rm -f build/faults.log
	$(BIN)/python -m pytest -m faults --log-to build/faults.log $(ARGS)

test-deploy: $(VENV)/installed-dev ## as root, with the real Slurm, ssh, systemd, podman, GlusterFS and Alertmanager; DEPLOY_INSTALL=1 installs them
	@rm -f build/deploy.log
	$(BIN)/python -m pytest -m deploy --log-to build/deploy.log $(ARGS)

check: $(VENV)/installed-dev ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

monitor: ## Prometheus, with our rules, on a training of this machine
	@command -v prometheus >/dev/null || { echo "there is no Prometheus; run: sudo apt install prometheus" >&2; exit 1; }
	@echo "reads the training at 127.0.0.1:9464 (make train); its graphs:"
	@$(PYTHON) k8s/monitoring/picture.py --link --url http://127.0.0.1:$(MONITOR_PORT)
	@echo "its alerts: http://127.0.0.1:$(MONITOR_PORT)/alerts, or with Debian's Prometheus /classic/alerts"
	@mkdir -p build/prometheus
	prometheus --config.file=k8s/monitoring/prometheus.yml --storage.tsdb.path=build/prometheus \
		--web.listen-address=127.0.0.1:$(MONITOR_PORT) --log.level=warn

bench: $(VENV)/installed-dev ## the quick form of all benchmarks
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name --quick || exit 1; done

clean: ## remove what make train and make test made
	rm -rf $(VENV) $(MADE_HERE:%=data/%) $(MADE_HERE:%=runs/%) build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) launch/make_venv.py $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing torch, DeepSpeed and DALI into $(VENV) (a few minutes, once)"
	$(PIP) -e .
	@touch $@

# The libraries whose neurons χ steers too. --no-deps: their torchvision does not load beside a CPU build of torch.
# SpikingJelly needs Python 3.11; without it its tests are skipped.
PEERS := "spikingjelly; python_version >= '3.11'" snntorch norse loguru nir nirtorch h5py

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) -e ".[dev]"
	$(PIP) --no-deps $(PEERS)
	@touch $@
