# Every routine command. Each target installs what it needs with apt-get (as root) and is quick when all is there.

SHELL := /bin/sh
CARGO ?= cargo
FUZZ_TARGET ?= parse

BUILD_TOOLS := cc:gcc /usr/include/stdlib.h:libc6-dev
TEST_TOOLS := $(BUILD_TOOLS) qemu-aarch64-static:qemu-user-static qemu-x86_64-static:qemu-user-static \
	docker-registry:docker-registry skopeo:skopeo umoci:umoci htpasswd:apache2-utils openssl:openssl \
	python3:python3 xz:xz-utils zstd:zstd tar:tar busybox:busybox-static flock:util-linux \
	setfattr:attr setcap:libcap2-bin git:git ssh-agent:openssh-client
BENCH_TOOLS := $(BUILD_TOOLS) python3:python3 busybox:busybox-static unshare:util-linux

.PHONY: help build frontend demo check test fmt clippy unit e2e e2e-tools dist bench bench-daemons fuzz codegen doc clean

help:            ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## */\1\t/p' Makefile

build:           ## the release binary, target/release/slipway
	@sh tests/install-tools.sh $(BUILD_TOOLS)
	$(CARGO) build --release --locked --package slipway-cli

# Linked statically, so that the image holds nothing else.
frontend:        ## the stand-alone frontend, target/frontend/, ready to be built as an image
	@sh tests/install-tools.sh $(BUILD_TOOLS)
	$(CARGO) rustc --release --locked --package slipway-gateway --bin slipway-gateway -- \
		-C target-feature=+crt-static
	mkdir -p target/frontend
	cp gateway/Dockerfile "$${CARGO_TARGET_DIR:-target}/release/slipway-gateway" target/frontend/

demo:            ## builds examples/hello for two platforms, from nothing
	@sh examples/demo.sh

check: fmt clippy unit   ## quick enough before every commit

test: e2e-tools fmt clippy unit e2e   ## everything; what CI runs

fmt:             ## formatting, changed nothing
	$(CARGO) fmt --all --check

clippy:
	@sh tests/install-tools.sh $(BUILD_TOOLS)
	$(CARGO) clippy --workspace --all-targets --locked -- --deny warnings

# The end-to-end tests are left to their own target; the architecture test is quick and belongs here.
unit: e2e-tools
	@sh tests/install-tools.sh $(BUILD_TOOLS)
	sh tests/run-tests.sh --workspace --exclude slipway-tests
	sh tests/run-tests.sh --package slipway-tests --lib --test architecture

e2e-tools:
	@sh tests/install-tools.sh $(TEST_TOOLS)

e2e: e2e-tools   ## drives the real binary against real tools; needs root
	$(CARGO) build --locked --package slipway-cli --package slipway-gateway
	@sh tests/base-image.sh .work/base >/dev/null
	SLIPWAY_BIN="$${SLIPWAY_BIN:-$${CARGO_TARGET_DIR:-$(CURDIR)/target}/debug/slipway}" \
		sh tests/run-tests.sh --package slipway-tests --test e2e

# As it is shipped.
dist:
	@sh tests/install-tools.sh $(BUILD_TOOLS)
	$(CARGO) build --profile dist --locked --package slipway-cli

bench: dist      ## compares with what else is on PATH; see bench/README.md
	@sh tests/install-tools.sh $(BENCH_TOOLS)
	python3 bench/run.py $(BENCH_ARGUMENTS)

bench-daemons: dist ## compares the daemon with buildkitd, if that is on PATH
	python3 bench/daemons.py $(BENCH_ARGUMENTS)

fuzz:            ## FUZZ_TARGET=parse|expand|ignore|dockerfile for FUZZ_SECONDS; needs cargo-fuzz and a C++ compiler
	cd fuzz && mkdir -p corpus/$(FUZZ_TARGET) && $(CARGO) fuzz run -s none $(FUZZ_TARGET) corpus/$(FUZZ_TARGET) \
		$(patsubst fuzz/%,%,$(wildcard fuzz/seeds/$(FUZZ_TARGET))) -- -max_total_time=$(or $(FUZZ_SECONDS),3600) -timeout=20

codegen:         ## writes spec/src/wire/ anew from spec/proto/
	$(CARGO) run --package slipway-spec --features codegen --example codegen

doc:             ## the documentation of all crates
	RUSTDOCFLAGS="--deny warnings" $(CARGO) doc --workspace --no-deps --locked --document-private-items

clean:           ## removes target/ and .work/
	$(CARGO) clean
	rm -rf .work .e2e
