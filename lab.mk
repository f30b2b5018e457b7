# The cluster on this machine: hosts made by the lab (systemd-nspawn), deployed like real servers, by ssh. Included by the Makefile.
LAB_HOSTS ?= broker1 sk1 sk2 sk3 ps1 store1 compute1
LAB := /usr/bin/python3 $(CURDIR)/lab
INVENTORY ?= inventory/lab

.PHONY: cluster lab lab-check psql destroy purge molecule

cluster: lab ## Make a cluster of 7 hosts on this machine, and prove by SQL that it works
	@echo "== deploying: ansible-playbook site.yml -i $(INVENTORY)"
	@ansible-playbook site.yml -i $(INVENTORY)
	@echo "== the cluster works. Open a session: make psql.  Look around: python3 -m lab list.  Remove it all: make destroy"

lab-check:
	@command -v python3 >/dev/null || { echo "error: python3 is missing: apt-get install python3" >&2; exit 2; }
	@$(LAB) check --before-install

lab: lab-check ## Make the hosts only
	@echo "== installing what is missing on this machine: packages, and .venv from requirements.lock"
	@tools/install-packages venv lab
	@$(MAKE) --no-print-directory venv
	@echo "== making the hosts $(LAB_HOSTS)"
	@$(LAB) up $(LAB_HOSTS) --mirror postgresql-15
	@$(LAB) list

psql: ## Open an SQL session on the cluster
	@$(LAB) exec compute1 -- env -i PATH=/usr/bin:/bin TERM="$$TERM" LC_ALL=C.UTF-8 HOME=/root \
	  PGPASSWORD="$$(cat .cache/lab/secrets/app_password)" psql -h compute1 -p 55433 -U app app $(PSQL_ARGS)

destroy: ## Remove the cluster and its hosts; images and built artifacts stay in .cache for the next time
	@$(LAB) destroy
	@rm -rf .cache/lab/secrets

purge: destroy ## The same, and remove images and artifacts too
	@rm -rf .cache/lab .cache/artifacts

MOLECULE_SCENARIOS ?= postgres storage_broker object_store safekeeper firewall single_node cluster
molecule: lab-check venv ## Test every role and the cluster's stories on hosts of the lab
	@for scenario in $(MOLECULE_SCENARIOS); do echo "== molecule $$scenario"; molecule test -s $$scenario || exit 1; done
