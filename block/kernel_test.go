package block

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// TestKernelOverlaySketch: what kernel overlayfs makes of an upper layer that still holds a sketch. With metacopy=off it
// refuses the file. With metacopy=on it looks at the attribute's length only and follows to the lower file: it serves the
// state before all writes, complete, and never the sketch's holes (docs/format.md, "Kernel overlayfs"). A file beside it
// stays readable.
func TestKernelOverlaySketch(t *testing.T) {
	for _, option := range []string{"metacopy=off", "metacopy=on"} {
		for name, format := range map[string]Format{"sparse": Sparse, "bcow": BCoW} {
			t.Run(option+"/"+name, func(t *testing.T) { kernelReads(t, option, format) })
		}
	}
}

func kernelReads(t *testing.T, option string, format Format) {
	dir := t.TempDir()
	for _, d := range []string{"lower", "upper", "work", "merged"} {
		if err := os.Mkdir(dir+"/"+d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	want := testContent(100_000)
	r := &rig{t: t, path: dir + "/upper/file", low: dir + "/lower/file"}
	if err := errors.Join(os.WriteFile(r.low, want, 0o644), os.WriteFile(dir+"/lower/other", want, 0o644)); err != nil {
		t.Fatal(err)
	}
	r.lower = openLower(r.low)
	r.init(Options{Format: format})
	r.write([]byte("x"), 50_000)
	if err := r.f.Sync(false); err != nil {
		t.Fatal(err)
	}

	data := "lowerdir=" + dir + "/lower,upperdir=" + dir + "/upper,workdir=" + dir + "/work," + option
	if err := unix.Mount("overlay", dir+"/merged", "overlay", 0, data); err != nil {
		t.Fatalf("mounting overlay with %s: %v (the kernel needs CONFIG_OVERLAY_FS)", data, err)
	}
	defer func() {
		if err := unix.Unmount(dir+"/merged", 0); err != nil {
			t.Error(err)
		}
	}()
	switch b, err := os.ReadFile(dir + "/merged/file"); {
	case option == "metacopy=off" && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EIO):
		t.Errorf("kernel overlayfs read %d bytes of the sketch, %v; want it refused", len(b), err)
	case option == "metacopy=on" && (err != nil || !bytes.Equal(b, want)):
		t.Errorf("kernel overlayfs read %d bytes of the sketch, %v; want the lower file", len(b), err)
	}
	if b, err := os.ReadFile(dir + "/merged/other"); err != nil || len(b) != len(want) {
		t.Errorf("the file beside it: %d bytes, %v", len(b), err)
	}
}

func BenchmarkWriteUpper4K(b *testing.B) {
	r := sparseRig(b, Options{CaW: CaWLazy}, 64<<20)
	p := testContent(4096)
	r.write(p, 0)
	b.ReportAllocs()
	b.SetBytes(4096)
	for b.Loop() {
		r.f.WriteAt(p, 0)
	}
}

// BenchmarkWritePlain4K is BenchmarkWriteUpper4K without the engine: pwrite alone.
func BenchmarkWritePlain4K(b *testing.B) {
	s := openUpper(b, b.TempDir()+"/plain")
	defer s.Close()
	p := testContent(4096)
	b.SetBytes(4096)
	for b.Loop() {
		s.WriteAt(p, 0)
	}
}

func BenchmarkPartialWrite(b *testing.B) {
	r := sparseRig(b, Options{}, 1<<30)
	p := testContent(410)
	off := int64(0)
	b.ReportAllocs()
	for b.Loop() {
		r.f.WriteAt(p, off)
		off = (off + 4096) & (1<<30 - 1)
	}
}

func BenchmarkReadLower4K(b *testing.B) {
	r := sparseRig(b, Options{}, 64<<20)
	p := make([]byte, 4096)
	b.ReportAllocs()
	b.SetBytes(4096)
	for b.Loop() {
		r.f.ReadAt(p, 4096)
	}
}

// BenchmarkFirstWrite is what the first byte written to a 1 GiB file of an image costs: making the sketch, writing,
// closing, and removing it again.
func BenchmarkFirstWrite(b *testing.B) {
	dir := b.TempDir()
	low := dir + "/lower"
	if err := errors.Join(os.WriteFile(low, nil, 0o644), os.Truncate(low, 1<<30)); err != nil {
		b.Fatal(err)
	}
	lower := openLower(low)
	id := identOf(b, lower)
	e := newEngine(b, Options{})
	b.ReportAllocs()
	for b.Loop() {
		s := openUpper(b, dir+"/upper")
		if err := e.Create(s, id); err != nil {
			b.Fatal(err)
		}
		f, err := e.Open(s, lower)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := f.WriteAt([]byte{1}, 12345); err != nil {
			b.Fatal(err)
		}
		if err := errors.Join(f.Abandon(), os.Remove(dir+"/upper")); err != nil {
			b.Fatal(err)
		}
	}
}
