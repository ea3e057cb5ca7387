#!/bin/sh
# Builds containerd 2 and its shim into bin/containerd2: Debian 12 has 1.6. What Go has built already it does not build again.
# The flags are those of bin/lamina, so that what both consist of is built once.
set -eu
cd "$(dirname "$0")/../tests/containerd2"
mkdir -p ../../bin/containerd2
CGO_ENABLED=0 "${GO:-go}" build -trimpath -o ../../bin/containerd2/ tool
