#!/bin/sh
# All tests, with progress, in an order that finds the cheapest failures first. Fails on what they leave behind.
set -eu
cd "$(dirname "$0")/.."
: "${GO:=go}" "${RACE:=./block/... ./union/...}"

if [ -z "${LAMINA_TEST_INNER:-}" ]; then
	LAMINA_TEST_INNER=1 exec scripts/own.sh test "$0" "$@"
fi

start=$(date +%s)
sync # what others have left to write must not count against the tests' time limits
failed=""
step() {
	title=$1
	shift
	printf '\n== %s [%ss]\n' "$title" "$(($(date +%s) - start))"
	if ! "$@"; then
		failed="$failed
   $title"
	fi
}

# packages PATTERN...: those of the patterns that exist and hold tests.
packages() { "$GO" list -f '{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}}{{end}}' "$@"; }

raced=$(packages $RACE)
network=$(packages ./net/...)
units=$(packages ./... | grep -v -e '^lamina/tests/' -e '^lamina/fusefs$' | grep -vxF -e "$raced" -e "$network" || true)

# Where the kernel does not carry FUSE over io_uring there is one transport to test. (The first open of /dev/fuse loads the
# module, and tests fail on a kernel that should have it.)
transports="dev uring"
: </dev/fuse
[ -e /sys/module/fuse/parameters/enable_uring ] || transports=dev

step "go vet" "$GO" vet ./...
# shellcheck disable=SC2086 # lists of packages
{
	# One at a time: mounts of one would live on in mount namespaces that another makes.
	[ -z "$units" ] || step "packages" "$GO" test -p 1 -timeout 20m $units
	# Two at a time: each has network namespaces of its own, and waits for kernels and agents most of the time.
	step "the network" "$GO" test -p 2 -timeout 20m $network
	step "block and union under the race detector" "$GO" test -race -timeout 20m $raced
	# One after the other: each has the machine's two cores and its own mounts.
	for transport in $transports; do
		step "fusefs over $transport" "$GO" test -count=1 -timeout 20m ./fusefs -transport="$transport"
		for suite in posix fsx oracle traps crash soak; do
			step "tests/$suite over $transport" "$GO" test -count=1 -timeout 20m "./tests/$suite" -transport="$transport"
		done
	done
	step "tests/survive" "$GO" test -count=1 -timeout 20m ./tests/survive
	step "tests/power" "$GO" test -count=1 -timeout 20m ./tests/power
	step "tests/packages" "$GO" test -count=1 -timeout 20m ./tests/packages
	step "tests/containerd" "$GO" test -count=1 -timeout 20m ./tests/containerd
	step "containerd 2 is built" scripts/containerd2.sh
	step "tests/containerd under containerd 2" "$GO" test -count=1 -timeout 20m ./tests/containerd -containerd="$PWD/bin/containerd2"
}
step "tests/stress" "$GO" test -count=1 -timeout 20m ./tests/stress
step "tests/podman" "$GO" test -count=1 -timeout 20m ./tests/podman
step "tests/graphdriver" sh -c 'cd tests/graphdriver && "$0" test -count=1 -timeout 20m -tags exclude_graphdriver_btrfs .' "$GO"
printf '\n== %ss\n' "$(($(date +%s) - start))"
if [ -n "$failed" ]; then
	echo "FAILED:$failed" >&2
	exit 1
fi
echo "all passed"
