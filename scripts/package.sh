#!/bin/sh
# package.sh [DIRECTORY]: a Debian package and a tarball of the same files, for this machine's architecture or GOARCH's, in
# DIRECTORY (out). The same commit gives the same bytes: nothing in them depends on when, where or as whom they are made.
set -eu
cd "$(dirname "$0")/.."
: "${GO:=go}"
out=${1:-out}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}" LC_ALL=C TZ=UTC CGO_ENABLED=0

# A tag vX.Y.Z, with what came after it; without any, the commits so far. dpkg wants a digit first, and sorts ~ before all.
version=${VERSION:-$(git describe --tags --match 'v[0-9]*' --dirty=.dirty 2>/dev/null ||
	echo "v0.1~$(git rev-list --count HEAD).$(git describe --always --dirty=.dirty)")}
version=$(echo "${version#v}" | sed 's/-\([0-9][0-9]*\)-g/+\1.g/')
arch=$($GO env GOARCH)

tree=$(mktemp -d "${TMPDIR:-/tmp}/lamina-package.XXXXXX")
trap 'rm -rf "$tree"' EXIT INT TERM
root=$tree/root
doc=$root/usr/share/doc/lamina
umask 022

$GO build -trimpath -buildvcs=false -ldflags "-s -w -buildid= -X lamina/cmd/lamina/cli.version=$version" -o "$root/usr/bin/lamina" ./cmd/lamina
$GO build -trimpath -buildvcs=false -ldflags "-s -w -buildid=" -o "$root/usr/lib/cni/lamina-cni" ./cmd/lamina-cni
mkdir -p "$root/usr/sbin"
ln -s ../bin/lamina "$root/usr/sbin/mount.fuse.lamina"

# Manual pages are made from the commands and committed; a test keeps them so. Completions come out of the program itself, and
# a foreign architecture's cannot be run here.
for page in man/*.[18]; do
	section=${page##*.}
	mkdir -p "$root/usr/share/man/man$section"
	gzip -9n <"$page" >"$root/usr/share/man/man$section/${page##*/}.gz"
done
native=$root/usr/bin/lamina
if [ "$arch" != "$($GO env GOHOSTARCH)" ]; then
	native=$tree/lamina
	GOARCH='' $GO build -trimpath -o "$native" ./cmd/lamina
fi
install -d "$root/usr/share/bash-completion/completions" "$root/usr/share/zsh/vendor-completions" "$root/usr/share/fish/vendor_completions.d"
"$native" completion bash >"$root/usr/share/bash-completion/completions/lamina"
"$native" completion zsh >"$root/usr/share/zsh/vendor-completions/_lamina"
"$native" completion fish >"$root/usr/share/fish/vendor_completions.d/lamina.fish"

install -d "$root/usr/lib/systemd/system" "$root/usr/lib/modules-load.d" "$doc/examples/grafana"
cp deploy/systemd/* "$root/usr/lib/systemd/system/"
echo fuse >"$root/usr/lib/modules-load.d/lamina.conf"
cp -R deploy/examples/. "$doc/examples/"
cp deploy/grafana/* "$doc/examples/grafana/"
cp README.md "$doc/"
install -d "$doc/docs"
cp docs/*.md "$doc/docs/"
cp deploy/debian/copyright "$doc/copyright"
scripts/notices.sh | gzip -9n >"$doc/third-party-licenses.gz"

find "$root" -type d -exec chmod 0755 {} +
find "$root" -type f -exec chmod 0644 {} +
chmod 0755 "$root/usr/bin/lamina" "$root/usr/lib/cni/lamina-cni"
find "$root" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +

tar -C "$root" --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner --transform="flags=rSH;s,^\.,lamina-$version," -cf - . |
	gzip -6n >"$out/lamina-$version-linux-$arch.tar.gz"
echo "$out/lamina-$version-linux-$arch.tar.gz"

mkdir "$root/DEBIAN"
sed -e "s/@VERSION@/$version/" -e "s/@ARCH@/$arch/" -e "s/@SIZE@/$(du -sk --apparent-size --exclude=DEBIAN "$root" | cut -f1)/" deploy/debian/control >"$root/DEBIAN/control"
for s in postinst prerm postrm; do install -m 0755 "deploy/debian/$s" "$root/DEBIAN/$s"; done
(cd "$root" && find usr -type f -print0 | sort -z | xargs -0 md5sum) >"$root/DEBIAN/md5sums"
find "$root/DEBIAN" "$root" -maxdepth 1 -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
dpkg-deb --root-owner-group -Zxz -z4 --threads-max=1 --build "$root" "$out/lamina_${version}_$arch.deb" >/dev/null
echo "$out/lamina_${version}_$arch.deb"
