#!/bin/sh
# notices.sh: the licences of every module whose code is in the lamina program, and of Go's own library, which those licences
# want to be passed on with it. Fails on a module without one.
set -eu
cd "$(dirname "$0")/.."
: "${GO:=go}"
echo "The program lamina contains code of the following. Lamina's own licence is Apache-2.0."
printf '\n==== Go (the language'"'"'s library)\n\n'
cat "$($GO env GOROOT)/LICENSE"
# The directory of a module's source is the last word of its line.
$GO list -deps -f '{{with .Module}}{{if not .Main}}{{.Path}} {{.Version}} {{.Dir}}{{end}}{{end}}' ./cmd/lamina | sort -u | while read -r path version dir; do
	printf '\n==== %s %s\n\n' "$path" "$version"
	found=""
	for f in "$dir"/LICENSE* "$dir"/LICENCE* "$dir"/COPYING* "$dir"/NOTICE*; do
		[ -f "$f" ] || continue
		found=1
		cat "$f"
	done
	[ -n "$found" ] || { echo "notices: $path $version has no licence file in $dir" >&2; exit 1; }
done
