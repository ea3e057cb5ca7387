package ipam

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newPool(t testing.TB, prefix string) Pool {
	return Pool{Dir: filepath.Join(t.TempDir(), "leases"), Prefix: netip.MustParsePrefix(prefix)}
}

func pod(i int) Pod {
	return Pod{Container: fmt.Sprint("container", i), Interface: "eth0", Network: "net", Labels: map[string]string{"app": "web"}}
}

// consistent checks what always holds: one lease for an address, all in the prefix, none reserved, each as its file says.
func consistent(t testing.TB, p Pool) map[netip.Addr]Lease {
	t.Helper()
	all, err := p.List()
	must(t, err)
	seen := map[netip.Addr]Lease{}
	for _, l := range all {
		if other, there := seen[l.Address]; there {
			t.Errorf("%s has two leases: %s and %s", l.Address, other.ID, l.ID)
		}
		if l.Err != nil {
			t.Error(l.Err)
		}
		if !p.Prefix.Contains(l.Address) || l.Address.Compare(p.first()) < 0 || l.Address.Compare(p.last()) > 0 {
			t.Errorf("%s is not to be given out", l.Address)
		}
		seen[l.Address] = l
	}
	return seen
}

func TestLease(t *testing.T) {
	p := newPool(t, "10.0.0.0/29")
	if p.Size() != 5 || p.first().String() != "10.0.0.2" || p.last().String() != "10.0.0.6" {
		t.Fatalf("size %d, %s to %s", p.Size(), p.first(), p.last())
	}
	if _, err := p.Find(pod(1).ID()); !errors.Is(err, ErrNone) {
		t.Errorf("no lease: %v", err)
	}
	l, err := p.Allocate(pod(1))
	must(t, err)
	again, err := p.Allocate(pod(1))
	if err != nil || again.Address != l.Address {
		t.Errorf("the same pod again: %v %v", again, err)
	}
	found, err := p.Find(pod(1).ID())
	if err != nil || found.Address != l.Address || found.Container != "container1" || found.Labels["app"] != "web" {
		t.Errorf("found %+v, %v", found, err)
	}
	for i := 2; i <= 5; i++ {
		_, err := p.Allocate(pod(i))
		must(t, err)
	}
	if len(consistent(t, p)) != 5 {
		t.Error("not five leases")
	}
	if _, err := p.Allocate(pod(6)); !errors.Is(err, ErrFull) || !strings.Contains(err.Error(), "10.0.0.0/29") || !strings.Contains(err.Error(), "larger prefix") {
		t.Errorf("a full prefix: %v", err)
	}
	must(t, p.Release(pod(1).ID()))
	must(t, p.Release(pod(1).ID()))
	if _, err := p.Allocate(pod(6)); !errors.Is(err, ErrResting) {
		t.Errorf("an address that rests: %v", err)
	}
	if n, err := p.Resting(); n != 1 || err != nil {
		t.Errorf("%d rest, %v", n, err)
	}
	// The hold-down passes.
	old := time.Now().Add(-2 * HoldDown)
	must(t, os.Chtimes(p.path(l.Address, freeSuffix), old, old))
	if got, err := p.Allocate(pod(6)); err != nil || got.Address != l.Address {
		t.Errorf("a rested address: %v %v", got, err)
	}
	consistent(t, p)
	// A clock that was set back does not hold an address for ever.
	must(t, p.Release(pod(6).ID()))
	ahead := time.Now().Add(1000 * time.Hour)
	must(t, os.Chtimes(p.path(l.Address, freeSuffix), ahead, ahead))
	if _, err := p.Allocate(pod(7)); !errors.Is(err, ErrResting) {
		t.Errorf("an address that rests: %v", err)
	}
	if st, err := os.Stat(p.path(l.Address, freeSuffix)); err != nil || time.Until(st.ModTime()) > time.Minute {
		t.Errorf("released in the future: %v", err)
	}
}

// An address that was released last is given out last.
func TestReuseIsLate(t *testing.T) {
	p := newPool(t, "10.0.0.0/28")
	p.HoldDown = -1
	var order []netip.Addr
	for i := range 2 * p.Size() {
		l, err := p.Allocate(pod(i))
		must(t, err)
		must(t, p.Release(l.ID))
		order = append(order, l.Address)
	}
	for i := range p.Size() {
		if order[i] != order[i+p.Size()] {
			t.Fatalf("not in turn: %v", order)
		}
		for j := range i {
			if order[i] == order[j] {
				t.Fatalf("reused early: %v", order)
			}
		}
	}
}

// A lease file that is damaged holds its address, troubles nobody else, and can be released.
func TestDamaged(t *testing.T) {
	for _, content := range []string{"", "{", "null", `{"address":"10.0.0.9"}`, "\x00\x00\x00"} {
		p := newPool(t, "10.0.0.0/29")
		l, err := p.Allocate(pod(1))
		must(t, err)
		must(t, os.WriteFile(p.path(l.Address, l.ID), []byte(content), 0o600))
		if _, err := p.Find(l.ID); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), p.path(l.Address, l.ID)) {
			t.Errorf("%q: %v", content, err)
		}
		for i := 2; i <= 5; i++ {
			other, err := p.Allocate(pod(i))
			must(t, err)
			if other.Address == l.Address {
				t.Errorf("%q: the address was given to another", content)
			}
		}
		if again, err := p.Allocate(pod(1)); err != nil || again.Address != l.Address {
			t.Errorf("%q: the pod itself again: %v %v", content, again, err)
		}
		must(t, os.WriteFile(p.path(l.Address, l.ID), []byte(content), 0o600))
		must(t, p.Release(l.ID))
		if got := consistent(t, p); len(got) != 4 {
			t.Errorf("%q: %d leases", content, len(got))
		}
	}
}

// Many at once, in one process.
func TestConcurrent(t *testing.T) {
	p := newPool(t, "10.0.0.0/25")
	p.HoldDown = -1
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := range 20 {
				l, err := p.Allocate(pod(w*1000 + i))
				if err != nil {
					t.Error(err)
					return
				}
				if i%2 == 0 {
					if err := p.Release(l.ID); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	if got := consistent(t, p); len(got) != 80 {
		t.Errorf("%d leases, not 80", len(got))
	}
}

const killVariable = "LAMINA_IPAM_KILL"

// TestMain is also a process that leases and releases until it is killed. It says what it has been promised.
func TestMain(m *testing.M) {
	dir := os.Getenv(killVariable)
	if dir == "" {
		os.Exit(m.Run())
	}
	p := Pool{Dir: dir, Prefix: netip.MustParsePrefix("10.0.0.0/25"), HoldDown: -1}
	for i := 0; ; i++ {
		l, err := p.Allocate(pod(os.Getpid()*1000 + i))
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		fmt.Println("leased", l.Address, l.ID)
		if i%3 != 0 {
			fmt.Println("releasing", l.Address, l.ID)
			if err := p.Release(l.ID); err != nil {
				fmt.Println("error", err)
				os.Exit(1)
			}
			fmt.Println("released", l.Address, l.ID)
		} else if i > 90 {
			fmt.Println("releasing all")
			for j := range i + 1 {
				_ = p.Release(pod(os.Getpid()*1000 + j).ID())
			}
			i = 0
		}
	}
}

// Processes that are killed at any instruction lose no lease they were given, and leave nothing that is in the way.
func TestKilled(t *testing.T) {
	p := newPool(t, "10.0.0.0/25")
	p.HoldDown = -1
	exe, err := os.Executable()
	must(t, err)
	for round := range 25 {
		out := filepath.Join(t.TempDir(), "out")
		f, err := os.Create(out)
		must(t, err)
		cmd := exec.Command(exe)
		cmd.Env = append(os.Environ(), killVariable+"="+p.Dir)
		cmd.Stdout = f
		must(t, cmd.Start())
		time.Sleep(20*time.Millisecond + time.Duration(round*1777)*time.Microsecond)
		must(t, cmd.Process.Kill())
		_ = cmd.Wait()
		f.Close()
		b, err := os.ReadFile(out)
		must(t, err)
		held := map[string]string{}
		maybe := false
		for line := range strings.Lines(string(b)) {
			words := strings.Fields(line)
			switch words[0] {
			case "error":
				t.Fatal(line)
			case "leased":
				held[words[2]] = words[1]
			case "releasing":
				if words[1] == "all" {
					maybe = true
				} else {
					delete(held, words[2])
				}
			}
		}
		got := consistent(t, p)
		if !maybe {
			for id, a := range held {
				if l := got[netip.MustParseAddr(a)]; l.ID != id {
					t.Errorf("%s was leased to %s, and is %q's", a, id, l.ID)
				}
			}
		}
		for _, l := range got { // what GC would do
			must(t, p.Release(l.ID))
		}
		if _, err := p.Allocate(pod(0)); err != nil {
			t.Fatal(err)
		}
		must(t, p.Release(pod(0).ID()))
	}
	if got := consistent(t, p); len(got) != 0 {
		t.Errorf("%d leases are left", len(got))
	}
}

// A thousand pods' addresses.
func TestThousand(t *testing.T) {
	p := newPool(t, "10.0.0.0/22")
	const pods = 1000
	for i := range pods {
		_, err := p.Allocate(pod(i))
		must(t, err)
	}
	if got := consistent(t, p); len(got) != pods {
		t.Fatalf("%d leases", len(got))
	}
	for i := pods; ; i++ {
		if _, err := p.Allocate(pod(i)); err != nil {
			if !errors.Is(err, ErrFull) || i != p.Size() {
				t.Errorf("after %d: %v", i, err)
			}
			break
		}
	}
	const gone = 100
	for i := range gone {
		must(t, p.Release(pod(i).ID()))
	}
	if got := consistent(t, p); len(got) != p.Size()-gone {
		t.Errorf("%d leases are left", len(got))
	}
}

// BenchmarkAllocate is a lease and its release among 1000.
func BenchmarkAllocate(b *testing.B) {
	p := newPool(b, "10.0.0.0/22")
	p.HoldDown = -1
	for i := range 1000 {
		_, err := p.Allocate(pod(i))
		must(b, err)
	}
	for b.Loop() {
		l, err := p.Allocate(pod(5000))
		must(b, err)
		must(b, p.Release(l.ID))
	}
}
