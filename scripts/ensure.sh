#!/bin/sh
# ensure.sh TARGET: install what `make TARGET` needs and this machine is missing (Debian 12, as root).
# Prints nothing when nothing is missing.
set -eu

# command:package pairs.
build=""
test="fio:fio setfattr:attr setfacl:acl mkfs.xfs:xfsprogs mkfs.ext4:e2fsprogs mkfs.btrfs:btrfs-progs fusermount3:fuse3 \
setcap:libcap2-bin sqlite3:sqlite3 losetup:mount tar:tar gcc:gcc unshare:util-linux setpriv:util-linux git:git tmux:tmux systemd-analyze:systemd \
mariadbd:mariadb-server-core mariadb:mariadb-client-core sysbench:sysbench \
containerd:containerd runc:runc busybox:busybox-static podman:podman buildah:buildah newuidmap:uidmap nsenter:util-linux stress-ng:stress-ng \
nft:nftables ip:iproute2 bridge:iproute2 nstat:iproute2 conntrack:conntrack ping:iputils-ping"
bench="mkfs.ext4:e2fsprogs mkfs.xfs:xfsprogs mkfs.btrfs:btrfs-progs losetup:mount findmnt:util-linux fuse-overlayfs:fuse-overlayfs \
fio:fio sqlite3:sqlite3 git:git tar:tar mariadbd:mariadb-server-core mariadb:mariadb-client-core sysbench:sysbench \
containerd:containerd runc:runc busybox:busybox-static nginx:nginx-light \
ip:iproute2 bridge:iproute2 nft:nftables ethtool:ethtool wrk:wrk memcached:memcached"
systemd="systemd-nspawn:systemd-container debootstrap:debootstrap busybox:busybox-static"
demo="sqlite3:sqlite3 mkfs.ext4:e2fsprogs losetup:mount"

case "${1:-}" in
build) want=$build ;;
test) want=$test ;;
bench) want=$bench ;;
demo) want=$demo ;;
systemd) want=$systemd ;;
*) echo "usage: ensure.sh build|test|bench|demo|systemd" >&2; exit 2 ;;
esac

PATH=$PATH:/usr/sbin:/sbin:/usr/local/go/bin
if ! command -v go >/dev/null; then
	echo "ensure: Go is missing. Install Go 1.26 or newer from https://go.dev/dl/ and put its bin directory in PATH." >&2
	exit 1
fi

missing=""
for pair in $want; do
	command -v "${pair%%:*}" >/dev/null || missing="$missing ${pair#*:}"
done
# The race detector needs C's headers, which gcc only recommends.
[ "$1" != test ] || [ -e /usr/include/stdlib.h ] || missing="$missing libc6-dev"
if [ -n "$missing" ]; then
	if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
		echo "ensure: missing:$missing. Install these packages, or run make as root on Debian and it will." >&2
		exit 1
	fi
	echo "ensure: installing$missing"
	export DEBIAN_FRONTEND=noninteractive
	apt="apt-get -o DPkg::Lock::Timeout=600 -o Acquire::Retries=5"
	$apt update -qq
	# shellcheck disable=SC2086 # a list of packages
	$apt install -y -qq --no-install-recommends $missing >/dev/null
fi

# Modules that a part of the tests needs at their end are fetched at their begin.
if [ "$1" = test ]; then
	(cd "$(dirname "$0")/.." && go build -o /dev/null github.com/containernetworking/cni/cnitool && go build -o /dev/null github.com/containernetworking/plugins/plugins/meta/portmap)
	(cd "$(dirname "$0")/../tests/graphdriver" && go list -deps -test -tags exclude_graphdriver_btrfs . >/dev/null)
	(cd "$(dirname "$0")/../tests/containerd2" && go list -deps tool >/dev/null)
fi

case "$1" in test | bench | demo)
	if [ "$(id -u)" != 0 ]; then
		echo "ensure: make $1 mounts filesystems: run it as root." >&2
		exit 1
	fi
	if [ ! -c /dev/fuse ]; then
		echo "ensure: /dev/fuse is missing: load the fuse module (modprobe fuse) or start the container with --device /dev/fuse." >&2
		exit 1
	fi
	;;
esac
