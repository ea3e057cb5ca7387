package bench

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const (
	kib = 1 << 10
	mib = 1 << 20
	gib = 1 << 30
)

// huge is the file of the layer that most scenarios write to.
const huge = "huge"

// hugeSize is its size.
func hugeSize(m Mode) int64 { return Pick[int64](m, 32*mib, 64*mib, 256*mib) }

// hugeLayer holds one large file.
func (l *Lab) hugeLayer() *Layer { return l.fileLayer(hugeSize(l.Mode())) }

// hugeSpace is what scenarios on one large file need: the layer, a plain copy, a copy-up, and some room.
func hugeSpace(size int64) int64 { return 4*size + gib/2 }

// fileLayer holds one file, huge, of a size.
func (l *Lab) fileLayer(size int64) *Layer {
	return l.Layer(fmt.Sprintf("%s-%d", huge, size), func(ctx context.Context, dir string) error {
		return fillFile(ctx, filepath.Join(dir, huge), size)
	})
}

// fillFile writes a file of noise, the same every time.
func fillFile(ctx context.Context, path string, size int64) error {
	noise := make([]byte, min(size, 16*mib))
	if _, err := rand.NewChaCha8([32]byte{}).Read(noise); err != nil {
		return err
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	for done := int64(0); done < size; done += int64(len(noise)) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := f.Write(noise[:min(int64(len(noise)), size-done)]); err != nil {
			return err
		}
	}
	return f.Close()
}

// fileSize of a path.
func fileSize(path string) (int64, error) {
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	return st.Size, err
}
