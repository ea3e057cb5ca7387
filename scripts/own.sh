#!/bin/sh
# own.sh NAME COMMAND...: run COMMAND with a TMPDIR of its own and, whatever becomes of it, leave nothing behind: no mount
# below that directory, no loop device on a file in it, no process started with it as TMPDIR, no network namespace named after
# LAMINA_RUN (net/lab). Anything found that COMMAND itself should have cleaned up is named, removed, and makes the exit status 1.
set -eu
name=$1
shift
base=${TMPDIR:-/tmp}
[ "$name" != test ] || [ ${#base} -le 12 ] || base=/tmp # sockets of containerd and directories of Podman need short names
run=$(mktemp -d "$base/lamina-$name.XXXXXX")
chmod 1777 "$run" # as any TMPDIR: tests also act as other users
export TMPDIR="$run"
LAMINA_RUN=${run##*.}-
export LAMINA_RUN

mounts() { awk -v d="$run/" 'index($2, d) == 1 { print $2 }' /proc/self/mounts | sort -r; }
loops() { losetup -n -O NAME,BACK-FILE 2>/dev/null | awk -v d="$run/" 'index($2, d) == 1 { print $1 }'; }
netns() { for n in /run/netns/lamt"$LAMINA_RUN"*; do [ ! -e "$n" ] || echo "${n##*/}"; done; }
# Processes are known by their environment, so that nobody else's are ever touched.
procs() {
	for p in /proc/[0-9]*; do
		[ "${p#/proc/}" != $$ ] || continue
		{ tr '\0' '\n' <"$p/environ"; } 2>/dev/null | grep -qxF "TMPDIR=$run" || continue
		# A zombie and our own pipeline's children hold nothing.
		exe=$(readlink "$p/exe" 2>/dev/null) || continue
		case "$exe" in */lamina | */fuse-overlayfs | *.test | */fio | */containerd | */containerd-shim-runc-v2 | */dockerd | */kube-apiserver | */conmon | */podman | \
			*/buildah | */busybox) echo "${p#/proc/}" ;; esac
	done
}

leaks=0
tries=10 # what has been told to end may need another moment
sweep() {
	trap - EXIT INT TERM
	while :; do
		found_m=$(mounts) found_p=$(procs) found_l=$(loops)
		[ -n "$found_m$found_p$found_l" ] || break
		tries=$((tries - 1))
		[ "$tries" -gt 0 ] || break
		sleep 1
	done
	found_n=$(netns) # whoever was to remove one has ended, or would have been waited for
	if [ -n "$found_m$found_p$found_l$found_n" ]; then
		leaks=1
		for m in $found_m; do
			echo "LEAK: still mounted: $m" >&2
			umount -l "$m" 2>/dev/null || true
		done
		for p in $found_p; do
			echo "LEAK: still running: $p $(tr '\0' ' ' <"/proc/$p/cmdline" 2>/dev/null)" >&2
			kill -9 "$p" 2>/dev/null || true
		done
		for l in $found_l; do
			echo "LEAK: still attached: $l" >&2
			losetup -d "$l" 2>/dev/null || true
		done
		for n in $found_n; do
			echo "LEAK: network namespace: $n" >&2
			ip netns del "$n" 2>/dev/null || true
		done
	fi
	chmod -R u+rwx "$run" 2>/dev/null || true
	rm -rf --one-file-system "$run" || leaks=1
}
trap 'tries=1; sweep; exit 130' INT
trap 'tries=1; sweep; exit 143' TERM
trap 'sweep' EXIT

status=0
"$@" || status=$?
sweep
[ "$leaks" = 0 ] || { echo "$name: leaked mounts, processes, loop devices or network namespaces (above)" >&2; [ "$status" != 0 ] || status=1; }
exit "$status"
