#!/bin/sh
# Every fuzzer of the module for FUZZTIME each. A finding lands in the package's testdata/fuzz and fails the run.
set -eu
cd "$(dirname "$0")/.."
: "${GO:=go}" "${FUZZTIME:=20s}"
found=0
for pkg in $("$GO" list ./...); do
	for f in $("$GO" test -list '^Fuzz' "$pkg" | grep '^Fuzz' || true); do
		found=$((found + 1))
		printf '== %s %s (%s)\n' "$pkg" "$f" "$FUZZTIME"
		"$GO" test -run '^$' -fuzz "^$f\$" -fuzztime "$FUZZTIME" "$pkg"
	done
done
[ "$found" -gt 0 ] || { echo "fuzz: no fuzzer found" >&2; exit 1; }
