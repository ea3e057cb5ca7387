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

	smallFiles = 40     // 1 KiB each
	firstFiles = 8      // 1 KiB each: written before a mount's first measurement
	largeFiles = 20     // 4 MiB each
	treeFiles  = 16_000 // 1 to 3 KiB each, in treeDirs directories
	treeDirs   = 400
)

// generate makes the layer that everything is measured on: small/, large/, huge (1 GiB) and tree/.
func generate(ctx context.Context, dir string) error {
	var key [32]byte
	noise := make([]byte, 16*mib)
	if _, err := rand.NewChaCha8(key).Read(noise); err != nil {
		return err
	}
	for _, d := range []string{"small", "large", "tree"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	for i := range smallFiles {
		if err := os.WriteFile(filepath.Join(dir, smallFile(i)), noise[:kib], 0o644); err != nil {
			return err
		}
	}
	for i := range firstFiles {
		if err := os.WriteFile(filepath.Join(dir, firstFile(i)), noise[:kib], 0o644); err != nil {
			return err
		}
	}
	for i := range largeFiles {
		if err := os.WriteFile(filepath.Join(dir, largeFile(i)), noise[:4*mib], 0o644); err != nil {
			return err
		}
	}
	for d := range treeDirs {
		sub := filepath.Join(dir, "tree", fmt.Sprintf("d%03d", d))
		if err := os.Mkdir(sub, 0o755); err != nil {
			return err
		}
		for i := range treeFiles / treeDirs {
			if err := os.WriteFile(filepath.Join(sub, fmt.Sprintf("file%02d", i)), noise[:kib+i*50], 0o644); err != nil {
				return err
			}
		}
	}
	huge, err := os.Create(filepath.Join(dir, "huge"))
	if err != nil {
		return err
	}
	defer huge.Close()
	for done := 0; done < gib; done += len(noise) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := huge.Write(noise); err != nil {
			return err
		}
	}
	// What is still on its way to the disk would disturb the first measurements.
	return unix.Syncfs(int(huge.Fd()))
}

func smallFile(i int) string { return fmt.Sprintf("small/%02d", i) }
func firstFile(i int) string { return fmt.Sprintf("small/first%d", i) }
func largeFile(i int) string { return fmt.Sprintf("large/%02d", i) }

// warm brings a file into the page cache.
func warm(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, mib)
	for {
		if n, err := f.Read(buf); n == 0 || err != nil {
			return nil
		}
	}
}

// allocatedBelow sums what the files below dir take up on the disk, in bytes, directories not counted.
func allocatedBelow(dir string) (int64, error) {
	var sum int64
	err := filepath.WalkDir(dir, func(p string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		sum += st.Blocks * 512
		return nil
	})
	return sum, err
}
