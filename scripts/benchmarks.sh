#!/bin/sh
# benchmarks.sh FILE [DOCUMENT]: put the tables of a run (`lamina bench --json >FILE`, `lamina bench net --json >FILE`) into
# DOCUMENT (docs/benchmarks.md), in the place of those that are there. What stands between the tables stays.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
run=$1
doc=${2:-$here/docs/benchmarks.md}
lamina=${LAMINA:-$here/bin/lamina}
tables=$(mktemp) new=$(mktemp)
trap 'rm -f "$tables" "$new"' EXIT
"$lamina" bench --from "$run" --markdown >"$tables"
awk '
	function name(line) { sub(/^<!-- bench: /, "", line); sub(/ -->$/, "", line); return line }
	# The first file: its parts, by name.
	NR == FNR {
		if ($0 ~ /^<!-- bench: .* -->$/) { part = name($0); text[part] = "" }
		else if ($0 == "<!-- end -->") part = ""
		else if (part != "") text[part] = text[part] $0 "\n"
		next
	}
	# The document: parts that the run has not are kept.
	!skip { print }
	/^<!-- bench: .* -->$/ && name($0) in text { printf "%s", text[name($0)]; put[name($0)] = 1; skip = 1 }
	skip && $0 == "<!-- end -->" { print; skip = 0 }
	END {
		for (part in text) if (!(part in put)) printf "benchmarks.sh: the document has no place for %s\n", part >"/dev/stderr"
		if (skip) { print "benchmarks.sh: the document has a part without an end" >"/dev/stderr"; exit 1 }
	}' "$tables" "$doc" >"$new"
cat "$new" >"$doc"
