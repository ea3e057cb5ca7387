package fusefs

import (
	"flag"
	"os"
	"path/filepath"
	"testing"
	"time"

	"lamina/block"
	"lamina/layer"
	"lamina/union"

	"golang.org/x/sys/unix"
)

// transports by the name that a status gives them.
var transports = map[string]Transport{"dev": TransportDev, "uring": TransportUring}

// transportFlag is the transport of every mount that does not choose its own.
var transportFlag = flag.String("transport", "auto", "transport under test: auto, dev or uring; a mount that gets another one fails")

// rig is one mount of one test.
type rig struct {
	*Server
	t                 testing.TB
	fs                *union.FS
	lower, upper, mnt string
}

// newRig mounts a union of one lower layer, filled by fill, and an upper layer unless opt.ReadOnly.
func newRig(t testing.TB, opt Options, fill func(lower string), change ...func(*union.Config)) *rig {
	t.Helper()
	base := t.TempDir()
	for _, d := range []string{base, filepath.Dir(base)} { // for actors under other users
		must(t, os.Chmod(d, 0o755))
	}
	r := &rig{t: t, lower: base + "/lower", upper: base + "/upper", mnt: base + "/mnt"}
	for _, d := range []string{r.lower, r.upper, base + "/work", r.mnt} {
		must(t, os.Mkdir(d, 0o777))
	}
	if fill != nil {
		fill(r.lower)
	}
	r.fs = openUnion(t, r.lower, r.upper, base+"/work", opt.ReadOnly, change...)
	r.mount(opt)
	return r
}

func (r *rig) mount(opt Options) {
	r.t.Helper()
	opt.AllowOther = true
	if opt.Logf == nil {
		opt.Logf = r.t.Logf
	}
	if opt.Transport == TransportAuto {
		opt.Transport = transports[*transportFlag]
	}
	s, err := Mount(r.fs, r.mnt, opt)
	if err != nil {
		must(r.t, r.fs.Close())
		r.t.Fatal(err)
	}
	r.Server = s
	r.t.Cleanup(func() {
		if err := s.Unmount(); err != nil {
			r.t.Errorf("%v", err)
			abandon(r.t, r.mnt)
			return
		}
		if n := s.srv.handles.open(); n != 0 {
			r.t.Errorf("%d handles were not released", n)
		}
		must(r.t, r.fs.Close())
	})
	if want, ok := transports[*transportFlag]; ok && transports[s.Status().Transport] != want && opt.Transport == want {
		r.t.Fatalf("mounted with transport=%s, and yet its transport is %s", *transportFlag, s.Status().Transport)
	}
	must(r.t, refusePoll(r.mnt))
}

// refusePoll makes the kernel learn that there is no POLL here. These tests open files of their own mount, and Go puts
// those into epoll: the thread that does might wait for the one that should answer. go-fuse keeps a name for this.
func refusePoll(mnt string) error {
	fd, err := unix.Open(filepath.Join(mnt, ".go-fuse-epoll-hack"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	return err
}

func openUnion(t testing.TB, lower, upper, work string, readOnly bool, change ...func(*union.Config)) *union.FS {
	t.Helper()
	low, err := layer.OpenDir(lower, layer.Options{ReadOnly: true})
	must(t, err)
	cfg := union.Config{Lowers: []layer.Layer{low}, Engine: block.NewEngine(block.Options{SettleDelay: time.Millisecond, Logf: t.Logf}),
		CopyUp: union.CopyUpBlock, Redirect: true, Follow: true, Index: true, Logf: t.Logf}
	if !readOnly {
		cfg.Upper, err = layer.OpenDir(upper, layer.Options{})
		must(t, err)
		cfg.Work, err = layer.OpenDir(work, layer.Options{})
		must(t, err)
	}
	for _, f := range change {
		f(&cfg)
	}
	fs, err := union.New(cfg)
	must(t, err)
	return fs
}

func (r *rig) path(name string) string { return r.mnt + "/" + name }
