# Lamina. `make demo` and `make test` are all the set-up there is: each installs what it needs and is missing. `make help`
# names the rest.

GO          ?= go
FUZZTIME    ?= 20s
STATICCHECK ?= honnef.co/go/tools/cmd/staticcheck@v0.8.2
PREFIX      ?= /usr/local
DOCKERD     ?= github.com/moby/moby/v2/cmd/dockerd@v2.0.0-beta.24

# Packages whose tests run under the race detector: the ones that share memory between goroutines on a hot path.
RACE = ./block/... ./union/...

.PHONY: help build test power docker systemd kubernetes demo bench lint fuzz package install uninstall clean
.DEFAULT_GOAL := build

help:
	@echo 'make            bin/lamina'
	@echo 'make demo       a first look: a database of an image, on Lamina and on kernel overlayfs, side by side'
	@echo 'make test       all tests'
	@echo 'make power      power cuts of real filesystems, many more than in make test'
	@echo 'make docker     Docker Engine, built here, on Lamina'
	@echo 'make systemd    the package in a new Debian 12 that is booted for it'
	@echo 'make kubernetes Kubernetes'\''s API server, built here, with the network'\''s agent as its client'
	@echo 'make fuzz       every fuzzer for FUZZTIME ($(FUZZTIME))'
	@echo 'make lint       gofmt, vet, staticcheck'
	@echo 'make bench      lamina bench $$(BENCHFLAGS), with what it measures against (BENCHFLAGS=net: the network)'
	@echo 'make package    a Debian package and a tarball, in out/'
	@echo 'make install    into PREFIX ($(PREFIX)), below DESTDIR; make uninstall takes it away'
	@echo 'make clean      removes bin/ and out/'

build:
	@scripts/ensure.sh build
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/lamina ./cmd/lamina
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/lamina-cni ./cmd/lamina-cni

test: build
	@scripts/ensure.sh test
	@GO="$(GO)" RACE="$(RACE)" scripts/test.sh

# Power cuts of real filesystems, at random, many more than a test run has time for.
power: build
	@scripts/ensure.sh test
	@scripts/own.sh power $(GO) test -count=1 -timeout 60m -v ./tests/power -power.cuts 60

# Docker Engine's daemon, built by Go, which takes minutes, on containerd 2 and Lamina.
docker: build
	@scripts/ensure.sh test
	@GO="$(GO)" scripts/containerd2.sh
	GOBIN=$(CURDIR)/bin CGO_ENABLED=0 $(GO) install -trimpath -tags exclude_graphdriver_btrfs $(DOCKERD)
	@scripts/own.sh docker $(GO) test -count=1 -timeout 20m -v -tags docker ./tests/containerd -run Docker -dockerd $(CURDIR)/bin/dockerd -containerd $(CURDIR)/bin/containerd2

# A new Debian 12 with its own systemd, from Debian's mirror, in which the package is installed and the README's lines are said.
systemd: build
	@scripts/ensure.sh systemd
	@scripts/own.sh systemd $(GO) test -count=1 -timeout 20m -v -tags systemd ./tests/systemd

# Kubernetes' API server, built by Go, which takes minutes, with what the network's agent is of it.
kubernetes:
	@scripts/ensure.sh test
	@GO="$(GO)" scripts/kube-apiserver.sh
	@scripts/own.sh kubernetes $(GO) test -count=1 -timeout 10m -v -tags kubernetes ./net/kube -run Real -kube-apiserver $(CURDIR)/bin/kube-apiserver

demo: build
	@scripts/ensure.sh demo
	@scripts/demo

# make bench BENCHFLAGS="net --full" measures the network, BENCHFLAGS="containers" containers.
bench: build
	@scripts/ensure.sh bench
	@scripts/own.sh bench bin/lamina bench $(BENCHFLAGS)

# gofmt, vet and staticcheck, each over the whole module; the first that has something to say fails the target.
lint:
	@scripts/ensure.sh build
	@files=$$(gofmt -l $$(git ls-files '*.go')); if [ -n "$$files" ]; then echo "gofmt -w these:"; echo "$$files"; exit 1; fi
	$(GO) vet ./...
	$(GO) vet -tags docker ./tests/containerd
	$(GO) vet -tags systemd ./tests/systemd
	$(GO) vet -tags kubernetes ./net/kube
	$(GO) run $(STATICCHECK) ./...

fuzz:
	@scripts/ensure.sh build
	@GO="$(GO)" FUZZTIME="$(FUZZTIME)" scripts/fuzz.sh

# A Debian package and a tarball, in out/.
package:
	@scripts/ensure.sh build
	@GO="$(GO)" scripts/package.sh out

# Container runtimes look for CNI plugins in /opt/cni/bin. The mount helper is what `mount -t fuse.lamina` looks for first; without it mount(8) would ask fuse3's mount.fuse.
install: build
	install -D -m 0755 bin/lamina $(DESTDIR)$(PREFIX)/bin/lamina
	install -D -m 0755 bin/lamina-cni $(DESTDIR)$(PREFIX)/lib/cni/lamina-cni
	mkdir -p $(DESTDIR)/sbin
	ln -sf $(PREFIX)/bin/lamina $(DESTDIR)/sbin/mount.fuse.lamina
	@if [ -d man ]; then install -d $(DESTDIR)$(PREFIX)/share/man/man1 $(DESTDIR)$(PREFIX)/share/man/man8; \
	  for p in man/*.[18]; do [ -e "$$p" ] || continue; install -m 0644 "$$p" $(DESTDIR)$(PREFIX)/share/man/man$${p##*.}/; done; fi

uninstall:
	rm -f $(DESTDIR)/sbin/mount.fuse.lamina $(DESTDIR)$(PREFIX)/bin/lamina $(DESTDIR)$(PREFIX)/lib/cni/lamina-cni
	rm -f $(DESTDIR)$(PREFIX)/share/man/man?/lamina*.[18]

clean:
	rm -rf bin out
