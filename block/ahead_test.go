package block

import (
	"bytes"
	"testing"
)

// TestLogIsBroughtAhead: a file that is written from front to back and synced after every few bytes is synced once a time,
// but for one in many. What is brought ahead is the lower file's, also after a power cut, and bounded.
func TestLogIsBroughtAhead(t *testing.T) {
	e := newEngine(t, Options{})
	low := &memLower{data: testContent(8 << 20), mtime: 5}
	store := newCrashStore(nil)
	f := store.sketch(t, e, low)
	want := bytes.Clone(low.data)
	const entry, entries = 512, 2000
	total := 0
	store.countSyncs(&total)
	for i := range entries {
		p := bytes.Repeat([]byte{byte(i), byte(i >> 8)}, entry/2)
		copy(want[i*entry:], p)
		if _, err := f.WriteAt(p, int64(i*entry)); err != nil {
			t.Fatal(err)
		}
		if err := f.Sync(true); err != nil {
			t.Fatal(err)
		}
	}
	if most := entries + 2*logSyncs + 2*entries*entry/aheadBytes + 4; total > most {
		t.Errorf("%d syncs of the store for %d of the file, expected %d at most", total, entries, most)
	}
	if _, _, upper := f.States(); upper > (entries*entry+aheadBytes)/4096+1 {
		t.Errorf("%d blocks are held after %d bytes", upper, entries*entry)
	}
	after, err := e.Open(newCrashStore(store.power()), low.open)
	if err != nil {
		t.Fatal(err)
	}
	expectContent(t, after, want)
	for _, f := range []*File{f, after} {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestRandomSyncsBringNothing: what is written here and there costs its own blocks only.
func TestRandomSyncsBringNothing(t *testing.T) {
	e := newEngine(t, Options{})
	low := &memLower{data: testContent(8 << 20), mtime: 5}
	f := newCrashStore(nil).sketch(t, e, low)
	for i := range int64(200) {
		if _, err := f.WriteAt(make([]byte, 4096), i*7%2048*4096); err != nil {
			t.Fatal(err)
		}
		if err := f.Sync(true); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, upper := f.States(); upper != 200 {
		t.Errorf("200 blocks were written, %d are held", upper)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}
