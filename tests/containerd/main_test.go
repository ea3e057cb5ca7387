// Package containerd tests root filesystems under a real containerd: its own overlayfs snapshotter and Lamina's, with the
// same tests, in the same engine.
package containerd

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"

	"lamina/bench/engine"
	"lamina/bench/rival"
)

var (
	bin      = flag.String("containerd", "", "directory with the containerd and containerd-shim-runc-v2 to test with (default: those in PATH)")
	subjects = flag.String("snapshotters", engine.Lamina, "snapshotters under test; overlayfs,lamina tells a fault of the tests from one of Lamina's")
)

// limit bounds every test.
const limit = 8 * time.Minute

// base holds the image's layers.
var base string

func TestMain(m *testing.M) {
	flag.Parse()
	var err error
	if base, err = os.MkdirTemp("", "image."); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	if err := os.RemoveAll(base); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func snapshotters() []string { return strings.Split(*subjects, ",") }

// bigSize is the size of the image's log, which is what containers write into.
const bigSize = 32 << 20

// Layers of the image: a small root, Debian packages over it, and over them what takes away, replaces and covers.
var layers = sync.OnceValues(func() ([]engine.Layer, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	var made []engine.Layer
	for i, fill := range []func(context.Context, string) error{engine.Skeleton, debian, cover} {
		root := filepath.Join(base, fmt.Sprint("root", i))
		if err := os.Mkdir(root, 0o755); err != nil {
			return nil, err
		}
		if err := fill(ctx, root); err != nil {
			return nil, err
		}
		l, err := engine.Pack(ctx, root, filepath.Join(base, fmt.Sprint("layer", i)))
		if err != nil {
			return nil, err
		}
		made = append(made, l)
	}
	return made, nil
})

// debian is a layer of packages: thousands of files, hard links, set-user-ID programs.
func debian(ctx context.Context, root string) error {
	for _, p := range []string{"libc6", "libselinux1", "libpcre2-8-0", "libacl1", "libattr1", "libgmp10", "libcrypt1", "coreutils", "findutils", "perl-base", "passwd"} {
		if err := engine.Package(ctx, root, p); err != nil {
			return err
		}
	}
	return nil
}

// cover is a layer that deletes a file and a directory of those below, hides what is in another one, and adds files.
func cover(ctx context.Context, root string) error {
	for _, d := range []string{"usr/bin", "usr/share/doc", "usr/share/perl5", "srv/tree/deep", "srv/locked"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			return err
		}
	}
	big := make([]byte, bigSize)
	for i := range big {
		big[i] = byte(i>>12) ^ byte(i*7)
	}
	for name, text := range map[string]string{
		"usr/bin/.wh.shred": "", "usr/share/doc/.wh.coreutils": "", "usr/share/perl5/.wh..wh..opq": "", "usr/share/perl5/mine": "mine\n",
		"srv/tree/a": "a\n", "srv/tree/deep/b": "b\n", "srv/locked/secret": "secret\n", "srv/big.log": string(big), "srv/moved": "moved\n",
	} {
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return errors.Join(os.Link(filepath.Join(root, "srv/tree/a"), filepath.Join(root, "srv/linked")),
		os.Symlink("tree/a", filepath.Join(root, "srv/pointer")), os.Chmod(filepath.Join(root, "srv/locked"), 0o700),
		os.Chown(filepath.Join(root, "srv/locked/secret"), 1000, 1000))
}

// rig is an engine for one test.
type rig struct {
	*engine.Engine
	t   *testing.T
	ctx context.Context
}

// start starts an engine, which is stopped when the test ends. What is left behind fails the test.
func start(t *testing.T, cfg engine.Config) *rig {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	dir, err := os.MkdirTemp("", "ctd.")
	if err != nil {
		t.Fatal(err)
	}
	cfg.Dir, cfg.Bin = dir, *bin
	if cfg.Lamina, err = rival.BinaryPath(); err != nil {
		t.Fatal(err)
	}
	e, err := engine.Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		if err := e.Close(); err != nil {
			t.Errorf("left behind: %v", err)
		}
		if t.Failed() {
			t.Log(e.Logs())
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return &rig{e, t, e.Context(ctx)}
}

// image imports the image and unpacks it for a snapshotter.
func (r *rig) image(snapshotter string) client.Image {
	r.t.Helper()
	l, err := layers()
	r.must(err)
	image, err := r.Import(r.ctx, "debian.test/base:1", []string{"/bin/sh"}, l...)
	r.must(err)
	r.must(image.Unpack(r.ctx, snapshotter))
	return image
}

func (r *rig) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

// sleeper runs a container that does nothing until it is told to.
func (r *rig) sleeper(image client.Image, snapshotter, id string) *engine.Container {
	r.t.Helper()
	c, err := r.Run(r.ctx, engine.Spec{ID: id, Image: image, Snapshotter: snapshotter, Args: []string{"sleep", "1000000"}})
	r.must(err)
	r.must(c.Check())
	return c
}

// sh runs a script in the container.
func (r *rig) sh(c *engine.Container, script string) string {
	r.t.Helper()
	out, err := c.Exec(r.ctx, "/bin/sh", "-ec", script)
	r.must(err)
	return out
}

// says fails the test unless a script prints what it should.
func (r *rig) says(c *engine.Container, script, want string) {
	r.t.Helper()
	if got := strings.TrimSpace(r.sh(c, script)); got != want {
		r.t.Errorf("%s: %s prints %q, not %q", c.ID(), script, got, want)
	}
}

// eventually polls until f is true.
func (r *rig) eventually(what string, f func() bool) {
	r.t.Helper()
	for !f() {
		select {
		case <-r.ctx.Done():
			r.t.Fatalf("waited in vain until %s", what)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// each runs a test for every snapshotter.
func each(t *testing.T, f func(t *testing.T, snapshotter string)) {
	for _, s := range snapshotters() {
		t.Run(s, func(t *testing.T) { f(t, s) })
	}
}
