package fusefs

import (
	"fmt"
	"os"
	"testing"

	"lamina/block"
	"lamina/layer"
	"lamina/union"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// The benchmarks below measure what the server itself does for a request: there is no mount, the requests are handed to it
// as a transport would. TMPDIR says which filesystem the layers lie on; on ext4 take one with a journal, freshly made.
//
//	TMPDIR=/mnt/ext4 go test ./fusefs -run '^$' -bench Work -benchmem

// noKernel is the transport of a server that nobody mounted: every backing file is accepted.
type noKernel struct {
	transport // nil: the rest is never asked for
	ids       int32
}

func (*noKernel) unregisterBacking(int32) {}
func (*noKernel) invalAttr(uint64)        {}

func (k *noKernel) registerBacking(int) (int32, error) {
	k.ids++
	return k.ids, nil
}

// bench is a server without a mount.
type bench struct {
	b   *testing.B
	srv *server
}

// newBench makes a server of a union whose lower layer holds n files of size bytes in the directory d.
func newBench(b *testing.B, n int, size int64) *bench {
	base := b.TempDir()
	lower := base + "/lower"
	for _, d := range []string{lower, base + "/upper", base + "/work", lower + "/d"} {
		must(b, os.Mkdir(d, 0o755))
	}
	data := make([]byte, min(size, 1<<20))
	for i := range data {
		data[i] = byte(i)
	}
	for i := range n {
		f, err := os.Create(fmt.Sprintf("%s/d/%d", lower, i))
		must(b, err)
		for at := int64(0); at < size; at += int64(len(data)) {
			_, err = f.WriteAt(data[:min(int64(len(data)), size-at)], at)
			must(b, err)
		}
		must(b, f.Close())
	}
	old := unix.Umask(0)
	b.Cleanup(func() { unix.Umask(old) })
	low, err := layer.OpenDir(lower, layer.Options{ReadOnly: true})
	must(b, err)
	upper, err := layer.OpenDir(base+"/upper", layer.Options{})
	must(b, err)
	work, err := layer.OpenDir(base+"/work", layer.Options{})
	must(b, err)
	fs, err := union.New(union.Config{Lowers: []layer.Layer{low}, Upper: upper, Work: work,
		Engine: block.NewEngine(block.Options{Logf: b.Logf}), Redirect: true, Follow: true, Index: true, Logf: b.Logf})
	must(b, err)
	opt := Options{Logf: b.Logf}
	must(b, opt.setDefaults())
	s := &bench{b: b, srv: newServer(fs, opt)}
	s.srv.dev = &noKernel{}
	b.Cleanup(func() {
		s.srv.releaseAll()
		must(b, fs.Close())
	})
	return s
}

func (s *bench) ok(what string, st fuse.Status) {
	if st != fuse.OK {
		s.b.Fatalf("%s: %v", what, st)
	}
}

func (s *bench) lookup(dir uint64, name string) uint64 {
	var out fuse.EntryOut
	s.ok("lookup", s.srv.Lookup(nil, &fuse.InHeader{NodeId: dir}, name, &out))
	return out.NodeId
}

// files looks d and the n files in it up.
func (s *bench) files(n int) (dir uint64, ids []uint64) {
	dir = s.lookup(1, "d")
	for i := range n {
		ids = append(ids, s.lookup(dir, fmt.Sprint(i)))
	}
	return dir, ids
}

func (s *bench) open(id uint64, flags uint32) uint64 {
	in := fuse.OpenIn{Flags: flags}
	in.NodeId = id
	var out fuse.OpenOut
	s.ok("open", s.srv.Open(nil, &in, &out))
	return out.Fh
}

func (s *bench) write(fh uint64, p []byte, off int64) {
	h := s.srv.handles.get(fh)
	if h.passed { // the kernel would write by itself
		fd, _ := h.Backing()
		_, err := unix.Pwrite(fd, p, off)
		must(s.b, err)
		return
	}
	_, st := s.srv.Write(nil, &fuse.WriteIn{Fh: fh, Offset: uint64(off)}, p)
	s.ok("write", st)
}

func (s *bench) release(fh uint64) { s.srv.Release(nil, &fuse.ReleaseIn{Fh: fh}) }

// One iteration of write-many: the sketch is known, its blocks are written one after another.
func BenchmarkWorkWriteMany(b *testing.B) {
	const size = 256 << 20
	s := newBench(b, 1, size)
	_, ids := s.files(1)
	p := make([]byte, 410)
	s.release(s.open(ids[0], unix.O_RDWR))
	b.ReportAllocs()
	i := int64(0)
	for b.Loop() {
		fh := s.open(ids[0], unix.O_RDWR)
		s.write(fh, p, i*4096%size)
		s.release(fh)
		i++
	}
}

// First write to a lower file: open, one byte, close.
func BenchmarkWorkFirstWrite(b *testing.B) {
	for _, size := range []int64{1 << 10, 16 << 10, 64 << 10, 1 << 20} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			n := max(b.N, 1)
			s := newBench(b, n, size)
			_, ids := s.files(n)
			b.ReportAllocs()
			b.ResetTimer()
			for i := range n {
				fh := s.open(ids[i], unix.O_RDWR)
				s.write(fh, []byte{1}, size/2)
				s.release(fh)
			}
			b.StopTimer()
		})
	}
}

func BenchmarkWorkLookup(b *testing.B) {
	n := b.N
	s := newBench(b, n, 100)
	dir := s.lookup(1, "d")
	b.ReportAllocs()
	b.ResetTimer()
	for i := range n {
		s.lookup(dir, fmt.Sprint(i))
	}
}

func BenchmarkWorkNegativeLookup(b *testing.B) {
	s := newBench(b, 1, 100)
	dir := s.lookup(1, "d")
	for b.Loop() {
		s.lookup(dir, "absent")
	}
}

func BenchmarkWorkGetattr(b *testing.B) {
	s := newBench(b, 1, 100)
	dir, ids := s.files(1)
	for _, c := range []struct {
		name string
		id   uint64
	}{{"file", ids[0]}, {"dir", dir}} {
		b.Run(c.name, func(b *testing.B) {
			in := fuse.GetAttrIn{}
			in.NodeId = c.id
			var out fuse.AttrOut
			for b.Loop() {
				s.ok("getattr", s.srv.GetAttr(nil, &in, &out))
			}
		})
	}
}

func BenchmarkWorkUnlinkLower(b *testing.B) {
	n := b.N
	s := newBench(b, n, 100)
	dir, _ := s.files(n)
	b.ReportAllocs()
	b.ResetTimer()
	for i := range n {
		s.ok("unlink", s.srv.Unlink(nil, &fuse.InHeader{NodeId: dir}, fmt.Sprint(i)))
	}
}

func BenchmarkWorkChownLower(b *testing.B) {
	n := b.N
	s := newBench(b, n, 100)
	_, ids := s.files(n)
	b.ReportAllocs()
	b.ResetTimer()
	for i := range n {
		in := fuse.SetAttrIn{}
		in.NodeId, in.Valid, in.Owner = ids[i], fuse.FATTR_UID|fuse.FATTR_GID|fuse.FATTR_KILL_SUIDGID, fuse.Owner{Uid: 77, Gid: 77}
		var out fuse.AttrOut
		s.ok("chown", s.srv.SetAttr(nil, &in, &out))
	}
}

// What tar makes of a small file: look the name up, create it, write, set its times, owner and mode, close.
func BenchmarkWorkUntar(b *testing.B) {
	n := b.N
	s := newBench(b, 1, 100)
	var mk fuse.EntryOut
	in := fuse.MkdirIn{Mode: 0o755}
	in.NodeId = 1
	s.ok("mkdir", s.srv.Mkdir(nil, &in, "new", &mk))
	p := make([]byte, 2048)
	b.ReportAllocs()
	b.ResetTimer()
	for i := range n {
		name := fmt.Sprint(i)
		s.lookup(mk.NodeId, name)
		cr := fuse.CreateIn{Flags: unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL, Mode: unix.S_IFREG | 0o600}
		cr.NodeId = mk.NodeId
		var out fuse.CreateOut
		s.ok("create", s.srv.Create(nil, &cr, name, &out))
		s.write(out.Fh, p, 0)
		for _, set := range []fuse.SetAttrIn{
			{SetAttrInCommon: fuse.SetAttrInCommon{Valid: fuse.FATTR_ATIME | fuse.FATTR_MTIME, Atime: 5, Mtime: 5}},
			{SetAttrInCommon: fuse.SetAttrInCommon{Valid: fuse.FATTR_UID | fuse.FATTR_GID}},
			{SetAttrInCommon: fuse.SetAttrInCommon{Valid: fuse.FATTR_MODE, Mode: unix.S_IFREG | 0o644}},
		} {
			set.NodeId = out.NodeId
			var attr fuse.AttrOut
			s.ok("setattr", s.srv.SetAttr(nil, &set, &attr))
		}
		s.release(out.Fh)
		var attr fuse.AttrOut
		get := fuse.GetAttrIn{}
		get.NodeId = mk.NodeId
		s.ok("getattr", s.srv.GetAttr(nil, &get, &attr))
	}
}
