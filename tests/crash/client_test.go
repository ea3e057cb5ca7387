package crash

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"lamina/tests/layers"
)

// A client is a process that uses a mount until it gets an error, and says on its standard output what it has seen:
// "working" once it works, "synced N" when N records are on disk, and last the error that ended it.

const record = 3000 // bytes; no multiple of a block

func recordBytes(client, i int) []byte { return layers.Bytes(uint64(client)<<32|uint64(i), record) }

// runClient is what a client does for a living, by its number: it reads a lower file, writes to one, or appends records
// and syncs them.
func runClient(dir string, id int) {
	lives := []func(string, int) error{readOn, writeOn, syncOn}
	err := lives[id%len(lives)](dir, id)
	var errno unix.Errno
	if !errors.As(err, &errno) {
		fmt.Println("ended with", err)
		os.Exit(1)
	}
	fmt.Println("error", unix.ErrnoName(errno))
}

func readOn(dir string, id int) error {
	want := make([]byte, 64<<10)
	for i := 0; ; i++ {
		fd, err := unix.Open(filepath.Join(dir, "file0"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		_ = unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED)
		_, err = unix.Pread(fd, want, int64(i%4)<<16)
		err = errors.Join(err, unix.Close(fd))
		var st unix.Stat_t
		if err == nil {
			err = unix.Stat(filepath.Join(dir, fmt.Sprint("nothing", id, ".", i)), &st)
		}
		if !errors.Is(err, unix.ENOENT) {
			return err
		}
		working(i)
	}
}

func writeOn(dir string, id int) error {
	fd, err := unix.Open(filepath.Join(dir, fmt.Sprint("file", 1+id%2)), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	for i := 0; ; i++ {
		if _, err := unix.Pwrite(fd, recordBytes(id, i), int64(i*7919%(blocks*block-record))); err != nil {
			return err
		}
		working(i)
	}
}

func clientFile(dir string, id int) string { return filepath.Join(dir, fmt.Sprint("client", id)) }

func syncOn(dir string, id int) error {
	fd, err := unix.Open(clientFile(dir, id), unix.O_RDWR|unix.O_CREAT|unix.O_APPEND|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return err
	}
	for i := 0; ; i++ {
		if _, err := unix.Write(fd, recordBytes(id, i)); err != nil {
			return err
		}
		working(i)
		if i%4 == 3 {
			if err := unix.Fsync(fd); err != nil {
				return err
			}
			fmt.Println("synced", i+1)
		}
	}
}

func working(i int) {
	if i == 0 {
		fmt.Println("working")
	}
}

// synced finds in what a client said how many of its records must be there.
func synced(said string) (n int) {
	for line := range strings.Lines(said) {
		_, _ = fmt.Sscanf(line, "synced %d", &n)
	}
	return n
}
