package containerd

import (
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"lamina/bench/engine"
)

// A container's whole life: its image is unpacked, it runs, is written to, committed, run from the commit, stopped, started
// again and removed, and garbage collection leaves nothing of it.
func TestLife(t *testing.T) {
	each(t, func(t *testing.T, s string) {
		r := start(t, engine.Config{})
		image := r.image(s)
		once, err := r.Run(r.ctx, engine.Spec{ID: "once", Image: image, Snapshotter: s, Args: []string{"sh", "-c", "echo out; id -u; test -e /etc/passwd"}})
		r.must(err)
		r.must(once.Wait(r.ctx))
		if out, err := once.Output(); err != nil || out != "out\n0\n" {
			t.Errorf("it printed %q, %v", out, err)
		}
		r.must(once.Remove(r.ctx))

		c := r.sleeper(image, s, "first")
		r.says(c, "cat /srv/tree/deep/b /usr/share/perl5/mine", "b\nmine")
		r.says(c, "ls /usr/share/perl5; ls -d /usr/bin/shred /usr/share/doc/coreutils 2>/dev/null || true", "mine")
		r.says(c, "stat -c '%U %u %a %h' /srv/locked/secret /srv/locked /srv/linked /usr/bin/passwd", "UNKNOWN 1000 644 1\nroot 0 700 2\nroot 0 644 2\nroot 0 4755 1")
		r.says(c, "perl -e 'print 6*7'", "42")
		before := r.sh(c, "md5sum </srv/big.log")
		r.sh(c, `printf XYZ | dd of=/srv/big.log bs=1 seek=5000000 conv=notrunc,fsync 2>/dev/null
			echo two >>/srv/tree/a; rm /srv/moved /srv/pointer; mkdir /srv/new; mv /srv/tree/deep /srv/new/deep
			chown 7:8 /srv/locked/secret; sync`)
		r.says(c, "dd if=/srv/big.log bs=1 skip=5000000 count=3 2>/dev/null", "XYZ")
		linked := "a\ntwo"
		if s == engine.Overlay {
			linked = "a" // copy-up breaks its hard links
		}
		r.says(c, "cat /srv/linked", linked)
		r.must(c.Stop(r.ctx))
		r.must(c.Again(r.ctx))
		r.says(c, "cat /srv/linked", linked)
		r.must(c.Stop(r.ctx))

		// The container is the top of a new image, and another one runs on it.
		committed, err := r.Commit(r.ctx, c, "debian.test/committed:1")
		r.must(err)
		r.must(c.Delete(r.ctx))
		if ok, err := committed.IsUnpacked(r.ctx, s); err != nil || !ok {
			t.Errorf("the committed image has no snapshot: %v", err)
		}
		d := r.sleeper(committed, s, "second")
		r.says(d, "cat /srv/new/deep/b /srv/linked; ls /srv", "b\n"+linked+"\nbig.log\nlinked\nlocked\nnew\ntree")
		r.says(d, "stat -c '%u %g %a' /srv/locked/secret", "7 8 644")
		r.says(d, "dd if=/srv/big.log bs=1 skip=5000000 count=3 2>/dev/null", "XYZ")
		r.says(d, "wc -c </srv/big.log", fmt.Sprint(bigSize))
		r.sh(d, "printf 123 | dd of=/srv/big.log bs=1 seek=5000001 conv=notrunc 2>/dev/null")
		r.says(d, "dd if=/srv/big.log bs=1 skip=5000000 count=5 2>/dev/null | head -c 4", "X123")

		// An image without its first name still serves its containers; with the last one everything goes.
		e := r.sleeper(image, s, "third")
		r.says(e, "md5sum </srv/big.log", strings.TrimSpace(before))
		r.must(r.RemoveImage(r.ctx, image.Name()))
		r.says(e, "cat /srv/tree/a", "a")
		r.must(e.Remove(r.ctx))
		r.must(d.Remove(r.ctx))
		r.must(r.RemoveImage(r.ctx, committed.Name()))
		r.eventually("all snapshots are collected", func() bool {
			names, err := r.SnapshotNames(r.ctx, s)
			r.must(err)
			return len(names) == 0
		})
	})
}

// The image of a commit does not depend on the snapshot that it was committed from: removed and unpacked from its layers, it
// is the same.
func TestCommitIsUnpackedElsewhere(t *testing.T) {
	for s, other := range map[string]string{engine.Lamina: engine.Overlay, engine.Overlay: engine.Lamina} {
		if !slices.Contains(snapshotters(), s) {
			continue
		}
		t.Run(s, func(t *testing.T) {
			r := start(t, engine.Config{})
			image := r.image(s)
			c := r.sleeper(image, s, "c")
			r.sh(c, "printf XYZ | dd of=/srv/big.log bs=1 seek=4095 conv=notrunc 2>/dev/null; rm -r /srv/tree; truncate -s 20000001 /srv/big.log; chmod 600 /srv/linked")
			sum := r.sh(c, "md5sum /srv/big.log /srv/linked; stat -c '%a %s' /srv/*")
			r.must(c.Stop(r.ctx))
			committed, err := r.Commit(r.ctx, c, "debian.test/committed:1")
			r.must(err)
			r.must(c.Delete(r.ctx))
			r.must(committed.Unpack(r.ctx, other))
			r.says(r.sleeper(committed, other, "d"), "md5sum /srv/big.log /srv/linked; stat -c '%a %s' /srv/*", strings.TrimSpace(sum))
		})
	}
}

// Ten containers of one image start, write into the same file of it, read and go, all at once; none sees another's bytes.
func TestTenAtOnce(t *testing.T) {
	each(t, func(t *testing.T, s string) {
		r := start(t, engine.Config{})
		image := r.image(s)
		var wg sync.WaitGroup
		errs := make([]error, 10)
		for i := range errs {
			wg.Go(func() {
				mark := fmt.Sprintf("%03d", i)
				c, err := r.Run(r.ctx, engine.Spec{ID: "c" + mark, Image: image, Snapshotter: s, Args: []string{"sh", "-ec", `
					n=0; while [ $n -lt 20 ]; do
						printf ` + mark + ` | dd of=/srv/big.log bs=1 seek=$((n * 1000000 + 4094)) conv=notrunc 2>/dev/null
						n=$((n + 1))
					done
					echo ` + mark + ` >/srv/mine; rm /srv/pointer; chown 5 /srv/tree/a
					n=0; while [ $n -lt 20 ]; do
						dd if=/srv/big.log bs=1 skip=$((n * 1000000 + 4094)) count=3 2>/dev/null; echo
						n=$((n + 1))
					done`}})
				if err == nil {
					err = c.Wait(r.ctx)
				}
				if err != nil {
					errs[i] = err
					return
				}
				out, err := c.Output()
				if want := strings.Repeat(mark+"\n", 20); err == nil && out != want {
					err = fmt.Errorf("%s reads %q, not what it wrote", mark, out)
				}
				if err == nil {
					err = c.Remove(r.ctx)
				}
				errs[i] = err
			})
		}
		wg.Wait()
		for _, err := range errs {
			r.must(err)
		}
	})
}

// The same changes to the same image yield the same layer, byte for byte, whoever keeps them: what Lamina exports is what
// containerd's own snapshotter does. Files of the image that have several names are left alone, for there the contents are
// not the same: overlayfs gives the changed name a file of its own, Lamina keeps one file.
func TestSameLayer(t *testing.T) {
	r := start(t, engine.Config{})
	ctx, done, err := r.Client.WithLease(r.ctx) // a layer in no image is garbage
	r.must(err)
	defer func() { r.must(done(r.ctx)) }()
	l, err := layers()
	r.must(err)
	image, err := r.Import(r.ctx, "debian.test/base:1", []string{"/bin/sh"}, l...)
	r.must(err)
	// Times are set, for they are in the layer and would differ.
	const still = `/usr/bin/find / -xdev -newermt '2024-01-01' ! -path '/dev*' ! -path '/proc*' ! -path '/sys*' -depth -exec touch -h -d @1700000001 {} +; touch -d @1700000001 /`
	steps := []string{
		`printf XYZ | dd of=/srv/big.log bs=1 seek=5000000 conv=notrunc 2>/dev/null; printf tail >>/srv/big.log
		 chown 7:8 /srv/locked/secret; chmod 4711 /srv/locked/secret; chmod 750 /srv/locked
		 rm /srv/moved; mv /srv/pointer /srv/pointer2; mkdir /srv/new; cp -r /srv/tree/deep /srv/new
		 rm -r /srv/tree/deep; mkdir /srv/tree/deep; echo c >/srv/tree/deep/c
		 cp /srv/tree/a /srv/one; ln /srv/one /srv/two; ln /etc/group /srv/group; rm -r /usr/share/perl5
		 mkfifo /srv/fifo; mknod /srv/null c 1 3; ln -s /nowhere /srv/broken; : >/srv/empty; truncate -s 5000000 /srv/hole`,
		`printf 12345 | dd of=/srv/big.log bs=1 seek=4999998 conv=notrunc 2>/dev/null; truncate -s 30000000 /srv/big.log
		 rm /srv/fifo /srv/tree/deep/c; mv /srv/new /srv/newer; touch /srv/moved; chown -R 3:4 /usr/lib/x86_64-linux-gnu`,
	}
	exported := map[string][]digest.Digest{}
	for _, s := range []string{engine.Overlay, engine.Lamina} {
		r.must(image.Unpack(r.ctx, s))
		from := image
		for i, step := range steps {
			c := r.sleeper(from, s, fmt.Sprintf("%s-%d", s, i))
			r.sh(c, step+"\n"+still)
			running, err := r.Diff(ctx, c)
			r.must(err)
			r.must(c.Stop(r.ctx))
			name := fmt.Sprintf("debian.test/%s:%d", s, i)
			from, err = r.Commit(r.ctx, c, name)
			r.must(err)
			r.must(c.Delete(r.ctx))
			ids, err := from.RootFS(r.ctx)
			r.must(err)
			top := ids[len(ids)-1]
			exported[s] = append(exported[s], r.withoutClock(top))
			if r.withoutClock(running.Digest) != exported[s][i] {
				t.Errorf("%s, step %d: the layer of the running container is not that of the stopped one", s, i)
			}
		}
	}
	if o, l := exported[engine.Overlay], exported[engine.Lamina]; !slices.Equal(o, l) {
		t.Errorf("overlayfs exports %v, lamina %v", o, l)
	}
}

// A container on a snapshot that is in use cannot be removed from under another one, and says so.
func TestParentsStay(t *testing.T) {
	each(t, func(t *testing.T, s string) {
		r := start(t, engine.Config{})
		c := r.sleeper(r.image(s), s, "child")
		sn := r.Client.SnapshotService(s)
		info, err := sn.Stat(r.ctx, "child")
		r.must(err)
		if err := sn.Remove(r.ctx, info.Parent); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("removing a parent: %v", err)
		}
		if _, err := sn.Prepare(r.ctx, "child", info.Parent); !errdefs.IsAlreadyExists(err) {
			t.Errorf("preparing a name twice: %v", err)
		}
		if _, err := sn.Prepare(r.ctx, "orphan", "no-such-parent"); !errdefs.IsNotFound(err) {
			t.Errorf("preparing without parent: %v", err)
		}
		usage, err := sn.Usage(r.ctx, "child")
		r.must(err)
		r.sh(c, "dd if=/dev/urandom of=/srv/fresh bs=1M count=4 2>/dev/null; sync")
		more, err := sn.Usage(r.ctx, "child")
		r.must(err)
		if grown := more.Size - usage.Size; grown < 4<<20 || grown > 5<<20 {
			t.Errorf("4 MiB written: usage has grown by %d", grown)
		}
		r.says(c, "cat /srv/tree/a", "a")
	})
}

// withoutClock is the digest of a layer, all of its bytes, but for the one thing that containerd 1.6 takes from the clock: the
// time of whiteouts, with the checksum over it.
func (r *rig) withoutClock(layer digest.Digest) digest.Digest {
	r.t.Helper()
	tape, err := content.ReadBlob(r.ctx, r.Client.ContentStore(), ocispec.Descriptor{Digest: layer})
	r.must(err)
	const block = 512
	for at := 0; at+block <= len(tape); {
		h := tape[at : at+block]
		size, err := strconv.ParseInt(strings.Trim(string(h[124:136]), " \x00"), 8, 64)
		if err != nil && h[0] != 0 {
			r.t.Fatalf("layer %s: header at %d: %v", layer, at, err)
		}
		if name, _, _ := strings.Cut(string(h[:100]), "\x00"); strings.HasPrefix(path.Base(name), ".wh.") {
			clear(h[136:156])
		}
		at += block + int((size+block-1)/block)*block
	}
	return digest.FromBytes(tape)
}
