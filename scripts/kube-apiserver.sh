#!/bin/sh
# Builds Kubernetes' API server into bin/kube-apiserver, which takes minutes the first time.
set -eu
cd "$(dirname "$0")/../tests/kube-apiserver"
version=$("${GO:-go}" list -m -f '{{.Version}}' k8s.io/kubernetes)
CGO_ENABLED=0 "${GO:-go}" build -ldflags "-X k8s.io/component-base/version.gitVersion=$version" -o ../../bin/kube-apiserver tool
