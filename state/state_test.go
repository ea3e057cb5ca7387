package state

import (
	"bytes"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

type sample struct {
	id uint64
	_  [20]byte // records of a size that no word divides
}

// again opens an arena as a successor would.
func again(t *testing.T, a *Arena) *Arena {
	t.Helper()
	fd, err := unix.FcntlInt(a.File().Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	b, err := Open(os.NewFile(uintptr(fd), "again"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

func create(t *testing.T) *Arena {
	t.Helper()
	a, err := Create("test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	return a
}

func TestOnlyPublishedRecordsAreFound(t *testing.T) {
	a := create(t)
	for i := range uint64(1000) {
		r := a.New(28)
		As[sample](r).id = i
		if i%2 == 0 {
			r.Publish(Node)
		}
		if i%4 == 0 {
			r.Free()
		}
	}
	b := again(t, a)
	found := map[uint64]bool{}
	for _, r := range b.All(Node) {
		found[As[sample](r).id] = true
	}
	if len(found) != 250 || b.Count(Node) != 250 {
		t.Fatalf("%d records, counted %d, want 250", len(found), b.Count(Node))
	}
	for id := range found {
		if id%4 != 2 {
			t.Errorf("record %d should not be there", id)
		}
	}
	before := b.Memory()
	for range 500 { // what the first one left unpublished or freed is free again
		b.New(28).Publish(Link)
	}
	if b.Memory() != before {
		t.Errorf("memory grew from %d to %d although 500 records were free", before, b.Memory())
	}
}

func TestSizes(t *testing.T) {
	a := create(t)
	for _, n := range []int{1, 56, 57, 248, 249, 504, 505, MaxRecord} {
		r := a.New(n)
		if len(r.Bytes()) < n {
			t.Errorf("%d bytes asked for, %d given", n, len(r.Bytes()))
		}
		for i := range r.Bytes() {
			r.Bytes()[i] = 0xff
		}
		r.Publish(Chunk)
		if a.At(r.Ref()) != r {
			t.Errorf("a record is not found by its number")
		}
		r.Free()
		if r := a.New(n); !bytes.Equal(r.Bytes(), make([]byte, len(r.Bytes()))) {
			t.Errorf("a record of %d bytes is not zeros when it is given out again", n)
		}
	}
}

func TestForeignMemoryIsRefused(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(f); err == nil {
		t.Error("an empty file was taken for an arena")
	}
	if f, err = os.CreateTemp(t.TempDir(), ""); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(int64(total())); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(f); err == nil {
		t.Error("zeros were taken for an arena")
	}
}
