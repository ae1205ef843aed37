# `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

TARGET := $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),target)
CARGO_DENY_VERSION := 0.20.2
DENY := $(TARGET)/tools/bin/cargo-deny
# One build for all programs: the same dependencies with the same features serve them all.
RELEASE := cargo build --release --workspace --bins

# demo: seconds until it ends by itself (empty = Ctrl-C), whether Kafka takes part, and times the devices' real rates.
DURATION ?=
KAFKA ?= yes
RATE ?= 10
# torture: rounds, the seed of the first, and a part of the list of faults (words of their names, by commas).
ROUNDS ?= 40
SEED ?= 1
FAULTS ?=
# bench: 1 = a short form, under two minutes.
QUICK ?=

.PHONY: help demo test lint bench torture setup build advisories

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{ printf "  make %-11s %s\n", $$1, $$2 }'

demo: ## four home-automation streams through the node, live (DURATION=30, KAFKA=no, RATE=10)
	@scripts/setup build servers $(if $(filter no,$(KAFKA)),,kafka)
	@$(RELEASE)
	@exec $(TARGET)/release/demo --node $(TARGET)/release/telemetry --rate $(RATE) \
	  $(if $(DURATION),--duration $(DURATION)) $(if $(filter no,$(KAFKA)),--without-kafka)

test: setup lint build ## everything continuous integration runs
	cargo test --workspace
	$(MAKE) --no-print-directory torture
	$(MAKE) --no-print-directory bench QUICK=1
	$(MAKE) --no-print-directory demo DURATION=20

lint: setup $(DENY) ## format, clippy, licences and sources of dependencies
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	$(DENY) check bans licenses sources

advisories: $(DENY) ## known weaknesses of dependencies; needs the advisory database (network)
	$(DENY) check advisories

bench: ## measures with a baseline beside each (QUICK=1: under two minutes)
	@scripts/setup
	@$(RELEASE)
	@exec $(TARGET)/release/bench --node $(TARGET)/release/telemetry $(if $(filter 1,$(QUICK)),--quick)

torture: build ## faults under load: nothing lost, doubled or stuck (ROUNDS=40, SEED=1, FAULTS=kafka,power)
	@exec $(TARGET)/debug/torture --node $(TARGET)/debug/telemetry --rounds $(ROUNDS) --seed $(SEED) \
	  $(if $(FAULTS),--faults $(FAULTS))

build: setup
	cargo build --workspace --all-targets

setup: ## installs missing Debian packages
	@scripts/setup

# Its own target folder: the tool's build must not wait for, or disturb, the project's.
$(DENY): | setup
	@echo "cargo-deny is missing and will be built into $(TARGET)/tools (once, some minutes)"
	@mkdir -p $(TARGET)/tools
	CARGO_TARGET_DIR=$(TARGET)/tools/build CARGO_PROFILE_RELEASE_LTO=off cargo install cargo-deny --quiet --locked \
	  --version $(CARGO_DENY_VERSION) --root $(TARGET)/tools
	@rm -rf $(TARGET)/tools/build
