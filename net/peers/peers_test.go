package peers

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

func lease(prefix, node string) Lease {
	l := Lease{Prefix: netip.MustParsePrefix(prefix), Node: netip.MustParseAddr(node)}
	l.MAC = NodeMAC(l.Node)
	return l
}

func TestDiff(t *testing.T) {
	a, b, c := lease("10.0.1.0/24", "192.0.2.1"), lease("10.0.2.0/24", "192.0.2.2"), lease("10.0.3.0/24", "192.0.2.3")
	moved := lease("10.0.2.0/24", "192.0.2.9")
	added, changed, removed := Diff([]Lease{a, b}, []Lease{moved, c})
	if !slices.Equal(added, []Lease{c}) || !slices.Equal(changed, []Lease{moved}) || !slices.Equal(removed, []Lease{a}) {
		t.Errorf("added %v, changed %v, removed %v", added, changed, removed)
	}
	if added, changed, removed = Diff([]Lease{a, b}, []Lease{b, a}); len(added)+len(changed)+len(removed) != 0 {
		t.Errorf("the same in another order: %v %v %v", added, changed, removed)
	}
}

func TestOthers(t *testing.T) {
	self := lease("10.0.1.0/24", "192.0.2.1")
	other := lease("10.0.2.0/24", "192.0.2.2")
	nameless := other
	nameless.MAC = MAC{}
	got, err := Others(self, []Lease{self, nameless})
	if err != nil || !slices.Equal(got, []Lease{other}) {
		t.Errorf("%v %v", got, err)
	}
	// A wide prefix overlaps also what is not next to it.
	_, err = Others(self, []Lease{lease("10.8.0.0/13", "192.0.2.3"), lease("10.9.0.0/24", "192.0.2.4"), lease("10.10.0.0/24", "192.0.2.5")})
	if err == nil || len(err.(interface{ Unwrap() []error }).Unwrap()) != 2 {
		t.Errorf("two overlaps: %v", err)
	}
	if self.Host().String() != "10.0.1.1" || NodeMAC(self.Node).String() != "0e:6c:c0:00:02:01" {
		t.Errorf("%s %s", self.Host(), NodeMAC(self.Node))
	}
}

// The file is seen when it is written in place, replaced, removed and made again.
func TestFileWatched(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "peers")
	ctx, cancel := context.WithCancel(context.Background())
	updates, err := File(path).Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	expect := func(what string, want func(Update) bool) {
		t.Helper()
		deadline := time.After(20 * time.Second)
		for {
			select {
			case u := <-updates:
				if want(u) {
					return
				}
			case <-deadline:
				t.Fatal(what)
			}
		}
	}
	has := func(n int) func(Update) bool {
		return func(u Update) bool { return u.Err == nil && len(u.Leases) == n }
	}
	broken := func(u Update) bool { return u.Err != nil }
	write := func(path, s string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	expect("missing", broken)
	write(path, "# nobody\n")
	expect("made", has(0))
	write(path, "10.0.1.0/24 192.0.2.1 # one\n\n")
	expect("written in place", has(1))
	write(path+".new", "10.0.1.0/24 192.0.2.1\n10.0.2.0/24\t192.0.2.2 0e:6c:00:00:00:09")
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	expect("replaced", has(2))
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	expect("removed", broken)
	// As Kubernetes mounts a ConfigMap: a link to a file in a directory that is a link.
	for i, content := range []string{"10.0.1.0/24 192.0.2.1\n", ""} {
		data := filepath.Join(dir, "..data"+string(rune('0'+i)))
		if err := os.Mkdir(data, 0o700); err != nil {
			t.Fatal(err)
		}
		write(filepath.Join(data, "peers"), content)
		if err := os.Symlink(filepath.Base(data), filepath.Join(dir, "..tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "..tmp"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			if err := os.Symlink("..data/peers", path); err != nil {
				t.Fatal(err)
			}
		}
		expect("a ConfigMap", has(1-i))
	}
	cancel()
	deadline := time.After(20 * time.Second)
	for {
		select {
		case _, open := <-updates:
			if !open {
				return
			}
		case <-deadline:
			t.Fatal("the channel is not closed")
		}
	}
}
