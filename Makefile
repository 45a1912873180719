# The commands of the project; `make help` lists them. Everything a command needs, it installs and starts itself.

PYTHON := .venv/bin/python
LOCAL := exec $(PYTHON) -m deploy.local

.DEFAULT_GOAL := help
.PHONY: help ready run start stop status demo watch traces test lint proto settings contract dev-certs image-check kubernetes-check bench faults

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS='	' read -r name text; do \
	  printf '  make %-16s %s\n' "$$name" "$$text"; done

ready: # the virtual environment, as requirements-dev.txt has it; quick when nothing changed
	@sh deploy/bootstrap.sh

run: ready ## everything, in the foreground: prints the endpoints; Ctrl-C stops it all; [TLS=1] [CELLS=n]
	@$(LOCAL) run

start: ready ## start what is not running, in the background; [TLS=1] [CELLS=n]
	@$(LOCAL) start

stop: ready ## stop everything of this checkout
	@$(LOCAL) stop

status: ready ## what is running
	@$(LOCAL) status

demo: ready ## two weeks of sales and the owner's numbers; [FILE=sales.csv.gz] [LIMIT=n] [REPORT=out.json] [CELLS=n]
	@$(LOCAL) demo $(if $(FILE),--file "$$FILE") $(if $(LIMIT),--limit "$$LIMIT") $(if $(REPORT),--report "$$REPORT")

watch: ready ## Prometheus, its alarms and the dashboard, beside the stack; Ctrl-C stops it
	@$(LOCAL) watch

traces: ready ## a collector that prints traces as trees; see docs/traces.md; Ctrl-C stops it
	@exec $(PYTHON) -m deploy.local.collector

test: ready ## all tests, against real servers; [ARGS='-k name -x'] [LONG=1]
	@$(LOCAL) test $(ARGS)

lint: ready ## formatting, types, layers, contracts
	@PYTHON=$(PYTHON) deploy/lint.sh

proto: ready ## all that is made of proto/: Python code, descriptor image, reference
	@PYTHON=$(PYTHON) deploy/proto.sh

settings: ready ## docs/settings.md, of what the processes declare
	@$(PYTHON) -m deploy.settings_page

contract: ready ## accept what proto/ says now, breaking changes included; lint compares with it from then on
	@.venv/bin/buf build proto --exclude-source-info -o proto/accepted.binpb

dev-certs: ready ## a CA and certificates for trying out, in .local/certificates; `make run TLS=1` makes them too
	@$(PYTHON) -m deploy.certificates

image-check: ## build the container image without Docker, and try its commands; for root on Debian; [OPTIONAL=1]
	@OPTIONAL=$(OPTIONAL) bash deploy/image_check.sh

kubernetes-check: ready ## render deploy/kubernetes and validate it, without a cluster; needs kustomize or Go
	@bash deploy/kubernetes_check.sh

bench: ready ## measure; [ONLY=write|pipeline|analytics|isolation|size|cells] [REPORT=out.json]
	@exec $(PYTHON) -m tests.bench

faults: ready ## break the running system and count every cent; [FAULTS=n] [SEED=n] [CLUSTER=1] [CELLS=n] [REPORT=out.json]
	@exec $(PYTHON) -m tests.faults
