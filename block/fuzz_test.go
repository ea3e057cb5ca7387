package block

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"golang.org/x/sys/unix"
)

func FuzzParseHeader(f *testing.F) {
	for _, h := range []Header{
		{Format: Sparse, BlockSize: 4096, Ident: Ident{Size: 1 << 30, MtimeNS: 1763800000123456789, FS: 1 << 60, Ino: 123456}, Limit: 1 << 30, Size: naturalSize},
		{Format: Sparse, BlockSize: 65536, Ident: Ident{Size: 77, MtimeNS: -1}, Limit: 3, Size: 99, TablePos: 1 << 20, TablePages: 1},
		{Format: BCoW, BlockSize: 4096, Ident: Ident{Size: 1 << 20}, Limit: 1 << 20, Size: 1 << 20, TablePages: 1},
		{Format: BCoWSingle, BlockSize: 16384, Ident: Ident{Size: 1 << 30}, Limit: 0, Size: 5, TablePages: 67},
		{Format: Sparse, BlockSize: 4096, Complete: true, Size: 12},
		{Format: Sparse, BlockSize: 4096, Ident: Ident{Size: 1 << 20}, Limit: 1 << 20, Size: naturalSize, Addendum: "\x03\x00\x01\x05"},
	} {
		f.Add(h.encode())
	}
	f.Add([]byte{})
	f.Add([]byte{0, 4, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := ParseHeader(b)
		if err != nil {
			if !errors.Is(err, unix.EIO) {
				t.Errorf("%v is no EIO", err)
			}
			return
		}
		if h.Kernel {
			return
		}
		again, err := ParseHeader(h.encode())
		if err != nil || again != h {
			t.Errorf("%+v became %+v, %v", h, again, err)
		}
	})
}

// FuzzHeaderFields has the right checksum put on hostile fields.
func FuzzHeaderFields(f *testing.F) {
	f.Add(byte(1), byte(0), byte(12), []byte{5, 6, 1, 2, 3, 4, 5, 6, 7, 8, 9})
	f.Fuzz(func(t *testing.T, format, flags, shift byte, fields []byte) {
		b := append([]byte{headerMagic0, headerMagic1, headerVersion, format, flags, shift, 0, 0, 0, 0}, fields...)
		sealHeader(b)
		h, err := ParseHeader(b)
		if err == nil && (h.Limit > h.Ident.Size || h.TablePos < 0 || h.TablePos+h.TablePages*slotsSize < 0 || h.Size < naturalSize) {
			t.Errorf("accepted %+v", h)
		}
	})
}

func sealHeader(b []byte) {
	sum := headerSum(b)
	b[6], b[7], b[8], b[9] = byte(sum), byte(sum>>8), byte(sum>>16), byte(sum>>24)
}

func FuzzParsePage(f *testing.F) {
	id := pageID{kindBits, 1 << 20, 3}
	p := &page{}
	p.setBit(77)
	b := make([]byte, slotsSize)
	p.encode(b, id, 1)
	f.Add(bytes.Clone(b))
	p.encode(b[pageSize:], id, 2)
	f.Add(bytes.Clone(b))
	b[pageSize+700] ^= 1
	f.Add(b)
	f.Add(make([]byte, slotsSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < slotsSize {
			return
		}
		p := parsePage(b, id)
		whole := parseSlot(b[p.slot*pageSize:(p.slot+1)*pageSize], id).whole
		if !whole && !allZero(p.payload[:]) {
			t.Error("entries taken from a slot that is not whole")
		}
		if p.gen == 0 {
			return
		}
		out := make([]byte, slotsSize)
		p.encode(out, id, p.gen)
		q := parsePage(out, id)
		if q.gen != p.gen || q.payload != p.payload || q.damaged {
			t.Error("a page does not survive its own encoding")
		}
	})
}

func FuzzParseLeaf(f *testing.F) {
	l := &leaf{phys: [leafEntries]uint32{5, 0, physZero}}
	b := make([]byte, leafSize)
	l.encode(b[:leafSlot], 9, 1)
	f.Add(bytes.Clone(b))
	l.encode(b[leafSlot:], 9, 2)
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < leafSize {
			return
		}
		l := parseLeaf(b, 9)
		if l.gen == 0 && l.phys != [leafEntries]uint32{} {
			t.Error("entries out of nothing")
		}
	})
}

// FuzzOpenHostileSketch opens an upper file and header that nobody honest wrote, and does everything with it: no
// panic, no hang, no byte from outside the two files.
func FuzzOpenHostileSketch(f *testing.F) {
	low := &memLower{data: testContent(20_000), mtime: 5}
	for _, format := range []Format{Sparse, BCoW, BCoWSingle} {
		e := &Engine{opts: Options{Format: format, BlockSize: defaultBlockSize, CaW: CaWLazy, Logf: func(string, ...any) {}}, files: map[*File]struct{}{}}
		s := newCrashStore(nil)
		if err := e.Create(s, low.ident()); err != nil {
			f.Fatal(err)
		}
		x, err := e.Open(s, low.open)
		if err != nil {
			f.Fatal(err)
		}
		if _, err := x.WriteAt([]byte("hostile"), 9000); err != nil {
			f.Fatal(err)
		}
		if err := x.Close(); err != nil {
			f.Fatal(err)
		}
		body := make([]byte, min(s.live.size, 64<<10))
		s.live.read(body, 0)
		f.Add(s.live.header, body, s.live.size, int64(3))
	}
	f.Add([]byte{}, []byte("x"), int64(20_000), int64(0))
	f.Fuzz(func(t *testing.T, header, body []byte, stSize, at int64) {
		if stSize < 0 || stSize > 1<<40 {
			return
		}
		if len(header) >= headerFixed {
			header = bytes.Clone(header)
			sealHeader(header)
		}
		m := &image{pages: map[int64][]byte{}, header: header}
		m.write(body, 0)
		m.size = stSize
		m.cutTail()
		if at < 0 || at > 1<<40 {
			at = 0
		}
		store := func() Store { return newCrashStore(m) }
		if _, err := Check(store(), low.open, false); err != nil && !errors.Is(err, unix.EIO) && !errors.Is(err, io.EOF) {
			t.Logf("check: %v", err)
		}
		if l, err := OpenReadOnly(store(), low.open); err == nil {
			l.ReadAt(make([]byte, 10_000), at)
			l.SeekData(at)
			l.Close()
		}
		e := &Engine{opts: Options{Format: Sparse, BlockSize: defaultBlockSize, CaW: CaWLazy, Logf: func(string, ...any) {}}, files: map[*File]struct{}{}}
		x, err := e.Open(store(), low.open)
		if err != nil {
			return
		}
		size := x.Size()
		x.ReadAt(make([]byte, 10_000), at)
		x.WriteAt(make([]byte, 5000), min(at, size))
		x.Seek(0, unix.SEEK_HOLE)
		x.Sync(false)
		x.Truncate(size / 2)
		x.Truncate(size/2 + 10_000)
		x.Sync(false)
		if err := x.Close(); err != nil {
			x.Abandon()
		}
	})
}
