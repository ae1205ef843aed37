# `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

TARGET := $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),target)
VERSION_cargo-deny := 0.20.2
VERSION_cargo-deb := 3.8.0
VERSION_cargo-fuzz := 0.13.2
TOOLS := $(TARGET)/tools/bin
# The whole workspace, so that the node and the programs that measure it share their dependencies. No path of this machine
# comes into them, so that two builds are the same.
CARGO_HOME ?= $(HOME)/.cargo
NODE := RUSTFLAGS="--remap-path-prefix=$(CARGO_HOME)=/cargo --remap-path-prefix=$(CURDIR)=/telemetry" \
  cargo build --release --workspace --bin telemetry
PACKAGES := target/package
# Bounds of `systemd-analyze security`, times ten: 1.2.
EXPOSURE_MAX := 12

# demo: seconds until it ends by itself (empty = Ctrl-C), whether Kafka takes part, and times the devices' real rates.
DURATION ?=
KAFKA ?= yes
RATE ?= 10
# torture: rounds, the seed of the first, a part of the list of faults (words of their names, by commas), what the node's
# state is on (ext4, xfs), and how many Kafka brokers there are (3: the kafka-leader faults exist). DISK=no, where there are
# no loop devices: no disk of the node's own, and the faults that need one are named as never taken.
ROUNDS ?= 40
SEED ?= 1
FAULTS ?=
FILESYSTEM ?= ext4
KAFKA_NODES ?= 1
DISK ?= yes
# bench, service-test: 1 = a short form.
QUICK ?=
# fuzz: mapping, block or configuration, and for how long.
FUZZ ?= mapping

.PHONY: help release demo test lint bench torture fuzz deb service-test setup build advisories

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{ printf "  make %-13s %s\n", $$1, $$2 }'

release: ## the node itself: target/release/telemetry
	@scripts/setup build
	@$(NODE)

demo: ## five home-automation streams through the node, live (DURATION=30, KAFKA=no, RATE=10)
	@scripts/setup build servers $(if $(filter no,$(KAFKA)),,kafka)
	@$(NODE) --bin demo
	@exec $(TARGET)/release/demo --node $(TARGET)/release/telemetry --rate $(RATE) \
	  $(if $(DURATION),--duration $(DURATION)) $(if $(filter no,$(KAFKA)),--without-kafka)

# Many tests wait for servers more than they compute.
test: setup lint build ## everything continuous integration runs
	RUST_TEST_THREADS=$$(($$(nproc) * 3 / 2)) cargo test --workspace
	$(MAKE) --no-print-directory torture
	$(if $(filter no,$(DISK)),,$(MAKE) --no-print-directory torture ROUNDS=1 FAULTS=power-cut-ten FILESYSTEM=xfs)
	$(MAKE) --no-print-directory deb service-test QUICK=1
	$(MAKE) --no-print-directory bench QUICK=1
	$(MAKE) --no-print-directory demo DURATION=20

lint: setup $(TOOLS)/cargo-deny ## format, clippy, licences and sources of dependencies, the units' exposure, alerts, playbooks
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	$(TOOLS)/cargo-deny check bans licenses sources
	@for unit in systemd/*.service; do systemd-analyze security --no-pager --offline=true --threshold=$(EXPOSURE_MAX) \
	  $$unit | tail -n 1; done
	promtool check rules packaging/prometheus/telemetry.rules.yml
	promtool test rules packaging/prometheus/telemetry.test.yml
	cd ansible && ansible-lint --offline --profile production

advisories: $(TOOLS)/cargo-deny ## known weaknesses of dependencies; needs the advisory database (network)
	$(TOOLS)/cargo-deny check advisories

bench: ## measures with a baseline beside each (QUICK=1: under two minutes)
	@scripts/setup
	@$(NODE) --bin bench
	@exec $(TARGET)/release/bench --node $(TARGET)/release/telemetry $(if $(filter 1,$(QUICK)),--quick)

torture: build ## faults under load: nothing lost, doubled or stuck (ROUNDS=40, SEED=1, FAULTS=kafka,power, FILESYSTEM=xfs, DISK=no, KAFKA_NODES=3)
	@exec $(TARGET)/debug/torture --node $(TARGET)/debug/telemetry --rounds $(ROUNDS) --seed $(SEED) \
	  --filesystem $(FILESYSTEM) --kafka-nodes $(KAFKA_NODES) $(if $(FAULTS),--faults $(FAULTS)) \
	  $(if $(filter no,$(DISK)),--without-disk)

# Seeds are read, what is found goes to fuzz/corpus. Without the address sanitizer: unsafe code of the node are a few
# system calls, and the C libraries it links would have to be built with it too.
fuzz: setup $(TOOLS)/cargo-fuzz ## finds input that must not be (FUZZ=block, DURATION=600 seconds); needs a nightly toolchain
	@mkdir -p fuzz/corpus/$(FUZZ)
	PATH="$(abspath $(TOOLS)):$$PATH" cargo +nightly fuzz run -s none $(FUZZ) fuzz/corpus/$(FUZZ) \
	  fuzz/seeds/$(FUZZ) $(if $(filter configuration,$(FUZZ)),tests/check) -- \
	  -max_total_time=$(or $(DURATION),600) -timeout=10 -rss_limit_mb=1024

deb: setup $(TOOLS)/cargo-deb ## the Debian package: target/package/telemetry_<version>_<architecture>.deb
	@$(NODE)
	@package=$$(scripts/package) && again=$$(scripts/package --into $(PACKAGES)/again) && cmp $$package $$again && \
	  rm $$again && echo "$$package: packed twice, the same bits"
	@lintian --allow-root --fail-on error,warning $(PACKAGES)/*.deb

service-test: build $(TOOLS)/cargo-deb ## package and playbooks, from installation to purge in a booted Debian 12 (needs root)
	@$(NODE)
	@package=$$(scripts/package --into $(PACKAGES)/test) && \
	  newer=$$(scripts/package --into $(PACKAGES)/test --version 9999) && \
	  $(TARGET)/debug/service-test --package $$package --newer $$newer && \
	  exec $(TARGET)/debug/provision-test --package $$package --newer $$newer $(if $(filter 1,$(QUICK)),--quick)

build: setup
	cargo build --workspace --all-targets

setup: ## installs missing Debian packages
	@scripts/setup

# Their own target folder: a tool's build must not wait for, or disturb, the project's. Not optimised: they are built for
# longer than they run.
$(TOOLS)/%: | setup
	@echo "$* is missing and will be built into $(TARGET)/tools (once, some minutes)"
	@mkdir -p $(TARGET)/tools
	CARGO_TARGET_DIR=$(TARGET)/tools/build CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_OPT_LEVEL=0 cargo install $* --quiet --locked \
	  --version $(VERSION_$*) --root $(TARGET)/tools
	@rm -rf $(TARGET)/tools/build
