package bench

import (
	"context"
	"fmt"
	"math/rand/v2"

	"golang.org/x/sys/unix"
)

// BAOverlay's own case: a tenth of a block is written.
const (
	blockSize  = 4096
	tenth      = 410
	tenthStart = 100 // within the block
)

// checkEvery is how many operations a loop does before it looks for a Ctrl-C.
const checkEvery = 1024

// reopening writes a tenth of each of n blocks, in order: open, seek, write, close. The first open is where others copy the
// file up.
func reopening(ctx context.Context, path string, n int) error {
	f, err := newRawFile(path)
	if err != nil {
		return err
	}
	if err := firstByte(path, tenthStart); err != nil {
		return err
	}
	b := make([]byte, tenth)
	for i := range n {
		if i%checkEvery == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		if err := f.writeAt(b, int64(i)*blockSize+tenthStart); err != nil {
			return fmt.Errorf("%s, block %d: %w", path, i, err)
		}
	}
	return nil
}

func (f rawFile) writeAt(b []byte, off int64) error {
	fd, err := f.open(unix.O_WRONLY)
	if err != nil {
		return err
	}
	err = rawSeek(fd, off)
	if err == nil {
		err = rawWrite(fd, b)
	}
	if closed := rawClose(fd); err == nil {
		err = closed
	}
	return err
}

// keptOpen is reopening without opening: one descriptor serves all blocks.
func keptOpen(ctx context.Context, path string, n int) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(fd)
	b := make([]byte, tenth)
	for i := range n {
		if i%checkEvery == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		err := rawSeek(fd, int64(i)*blockSize+tenthStart)
		if err == nil {
			err = rawWrite(fd, b)
		}
		if err != nil {
			return fmt.Errorf("%s, block %d: %w", path, i, err)
		}
	}
	return nil
}

// shuffled are the numbers below n in a random order, the same every time.
func shuffled(n int) []int { return rand.New(rand.NewPCG(1, 2)).Perm(n) }

// readBlocks reads whole blocks of a file.
func readBlocks(ctx context.Context, path string, blocks []int) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(fd)
	b := make([]byte, blockSize)
	for i, n := range blocks {
		if i%checkEvery == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		if err := rawPread(fd, b, int64(n)*blockSize); err != nil {
			return fmt.Errorf("%s, block %d: %w", path, n, err)
		}
	}
	return nil
}

// writeBlocks writes whole blocks of a file.
func writeBlocks(ctx context.Context, path string, blocks []int) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(fd)
	b := make([]byte, blockSize)
	for i := range b {
		b[i] = byte(i)
	}
	for i, n := range blocks {
		if i%checkEvery == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		if _, err := unix.Pwrite(fd, b, int64(n)*blockSize); err != nil {
			return fmt.Errorf("%s, block %d: %w", path, n, err)
		}
	}
	return nil
}
