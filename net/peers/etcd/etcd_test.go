package etcd

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"

	"lamina/net/lab/etcdserver"
	"lamina/net/peers"
)

// server is an etcd in this process.
type server struct{ *etcdserver.Server }

func newServer(t *testing.T) *server {
	t.Helper()
	return &server{etcdserver.New(t, "http://127.0.0.1:0", transport.TLSInfo{}, nil)}
}

func (s *server) source(t *testing.T, o Options) *Source {
	t.Helper()
	o.Endpoints = []string{s.URL}
	src, err := New(o)
	must(t, err)
	t.Cleanup(func() { src.Close() })
	return src
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func lease(n int) peers.Lease {
	node := netip.AddrFrom4([4]byte{192, 168, 0, byte(n)})
	return peers.Lease{Prefix: netip.MustParsePrefix(fmt.Sprintf("10.244.%d.0/24", n)), Node: node, MAC: peers.NodeMAC(node)}
}

// wait reads updates until one is as wanted.
func wait(t *testing.T, what string, updates <-chan peers.Update, ok func(peers.Update) bool) {
	t.Helper()
	limit := time.After(30 * time.Second)
	var last peers.Update
	for {
		select {
		case u, open := <-updates:
			if !open {
				t.Fatalf("%s: the channel is closed; last was %+v", what, last)
			}
			if last = u; ok(u) {
				return
			}
		case <-limit:
			t.Fatalf("never: %s; last was %+v", what, last)
		}
	}
}

// leases is a condition: exactly these.
func leases(want ...peers.Lease) func(peers.Update) bool {
	return func(u peers.Update) bool {
		return u.Err == nil && (len(want) == 0 && len(u.Leases) == 0 || reflect.DeepEqual(u.Leases, want))
	}
}

// keep runs Keep until the returned function is called.
func keep(s *Source, l peers.Lease, report func(error)) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); s.Keep(ctx, l, report) }()
	return func() { cancel(); <-done }
}

func TestWatch(t *testing.T) {
	srv := newServer(t)
	one, two := srv.source(t, Options{}), srv.source(t, Options{})
	ctx, cancel := context.WithCancel(t.Context())
	updates, err := one.Watch(ctx)
	must(t, err)
	wait(t, "an empty network", updates, leases())
	defer keep(one, lease(1), nil)()
	wait(t, "own lease", updates, leases(lease(1)))
	stop := keep(two, lease(2), nil)
	wait(t, "another node's", updates, leases(lease(1), lease(2)))
	stop()
	moved := lease(2)
	moved.MAC[5]++
	defer keep(two, moved, nil)()
	wait(t, "a changed MAC", updates, leases(lease(1), moved))
	third := lease(3)
	third.Node = netip.MustParseAddr("192.168.0.33")
	defer keep(srv.source(t, Options{Prefix: "/another/network"}), third, nil)()
	must(t, two.put(t.Context(), lease(4)))
	wait(t, "of this network only", updates, leases(lease(1), moved, lease(4)))
	_, err = two.client.Delete(t.Context(), two.key(lease(4).Prefix))
	must(t, err)
	wait(t, "a removed lease", updates, leases(lease(1), moved))
	cancel()
	for u := range updates {
		_ = u // closed, sooner or later
	}
}

// A prefix has one node, whoever asks first.
func TestTaken(t *testing.T) {
	srv := newServer(t)
	one, two := srv.source(t, Options{}), srv.source(t, Options{})
	must(t, one.put(t.Context(), lease(1)))
	must(t, one.put(t.Context(), lease(1))) // the same node again
	thief := lease(1)
	thief.Node = netip.MustParseAddr("192.168.0.99")
	reports := make(chan error, 10)
	defer keep(two, thief, func(err error) { reports <- err })()
	var taken *TakenError
	if err := <-reports; !errors.As(err, &taken) || taken.Has.Node != lease(1).Node {
		t.Fatalf("report is %v", err)
	}
	_, err := one.client.Delete(t.Context(), one.key(lease(1).Prefix))
	must(t, err)
	if err := <-reports; err != nil {
		t.Errorf("after the other gave way: %v", err)
	}
}

func TestAcquire(t *testing.T) {
	srv := newServer(t)
	s := srv.source(t, Options{})
	network := netip.MustParsePrefix("10.244.0.0/22")
	// A node with a wider prefix lies in the way.
	wide := lease(9)
	wide.Prefix = netip.MustParsePrefix("10.244.1.0/24")
	must(t, s.put(t.Context(), wide))
	got := make([]peers.Lease, 24)
	var wg sync.WaitGroup
	for i := range got {
		wg.Go(func() {
			l, err := s.Acquire(t.Context(), network, 27, lease(i+100).Node, peers.MAC{})
			if err != nil {
				t.Error(err)
			}
			got[i] = l
		})
	}
	wg.Wait()
	all := append(slices.Clone(got), wide)
	for i, a := range all {
		if a.Prefix.Bits() != 27 && a != wide || !network.Contains(a.Prefix.Addr()) {
			t.Errorf("%s is not a part of %s", a.Prefix, network)
		}
		for _, b := range all[i+1:] {
			if a.Prefix.Overlaps(b.Prefix) {
				t.Errorf("%s and %s overlap", a, b)
			}
		}
	}
	if again, err := s.Acquire(t.Context(), network, 27, got[5].Node, peers.MAC{2}); err != nil || again.Prefix != got[5].Prefix {
		t.Errorf("the second time %s, %v; the first %s", again, err, got[5])
	}
	moved, err := s.Acquire(t.Context(), netip.MustParsePrefix("10.245.0.0/22"), 24, got[5].Node, peers.MAC{})
	if err != nil || moved.Prefix.String() != "10.245.0.0/24" {
		t.Errorf("in another network: %s, %v", moved, err)
	}
	if back, err := s.Acquire(t.Context(), network, 27, lease(199).Node, peers.MAC{}); err != nil || back.Prefix != got[5].Prefix {
		t.Errorf("the prefix of a node that moved is not free: %s, %v", back, err)
	}
	if _, err := s.Acquire(t.Context(), network, 27, lease(200).Node, peers.MAC{}); err == nil || !strings.Contains(err.Error(), "is full") {
		t.Errorf("in a full network: %v", err)
	}
	if _, err := s.Acquire(t.Context(), network, 21, lease(200).Node, peers.MAC{}); err == nil || !strings.Contains(err.Error(), "from 22 to 32") {
		t.Errorf("larger than the network: %v", err)
	}
}

func TestFree(t *testing.T) {
	at := func(s ...string) (out []peers.Lease) {
		for _, p := range s {
			out = append(out, peers.Lease{Prefix: netip.MustParsePrefix(p)})
		}
		return out
	}
	for _, c := range []struct {
		network string
		bits    int
		leases  []peers.Lease
		want    string
	}{
		{"10.0.0.0/16", 24, nil, "10.0.0.0/24"},
		{"10.0.0.0/16", 24, at("10.0.0.0/24", "10.0.2.0/24"), "10.0.1.0/24"},
		{"10.0.0.0/16", 24, at("10.0.0.0/20"), "10.0.16.0/24"},
		{"10.0.0.0/16", 24, at("10.0.0.128/25"), "10.0.1.0/24"},
		{"10.0.0.0/23", 24, at("10.0.0.0/24", "10.0.1.64/26"), ""},
		{"255.255.255.0/24", 25, at("255.255.255.0/24"), ""},
		{"10.0.0.0/24", 24, at("10.0.0.0/8"), ""},
	} {
		p, ok := free(netip.MustParsePrefix(c.network), c.bits, c.leases)
		if ok != (c.want != "") || ok && p.String() != c.want {
			t.Errorf("%+v: %v, %v", c, p, ok)
		}
	}
}

// etcd goes and comes back: an error, no leases taken away, and what changed meanwhile.
func TestGone(t *testing.T) {
	srv := newServer(t)
	s := srv.source(t, Options{Resync: 200 * time.Millisecond})
	reports := make(chan error, 100)
	defer keep(s, lease(1), func(err error) { reports <- err })()
	if err := <-reports; err != nil {
		t.Fatal(err)
	}
	updates, err := s.Watch(t.Context())
	must(t, err)
	wait(t, "own lease", updates, leases(lease(1)))
	srv.Stop()
	wait(t, "an error that names etcd", updates, func(u peers.Update) bool {
		return u.Err != nil && strings.Contains(u.Err.Error(), srv.URL) && strings.Contains(u.Err.Error(), "is it running")
	})
	if err := <-reports; err == nil {
		t.Error("the keeper noticed nothing")
	}
	srv.Start()
	wait(t, "leases after etcd is back", updates, leases(lease(1)))
	for err := range reports {
		if err == nil {
			break
		}
	}
	must(t, srv.source(t, Options{}).put(t.Context(), lease(2)))
	wait(t, "changes after etcd is back", updates, leases(lease(1), lease(2)))
}

// An etcd that was never there is the same error.
func TestNeverThere(t *testing.T) {
	s, err := New(Options{Endpoints: []string{"http://127.0.0.1:1"}})
	must(t, err)
	defer s.Close()
	updates, err := s.Watch(t.Context())
	must(t, err)
	wait(t, "an error", updates, func(u peers.Update) bool { return u.Err != nil && strings.Contains(u.Err.Error(), "127.0.0.1:1") })
	if _, err := New(Options{}); err == nil {
		t.Error("no endpoints are enough")
	}
}

// History that etcd has forgotten is no error: a snapshot takes its place.
func TestCompacted(t *testing.T) {
	srv := newServer(t)
	s := srv.source(t, Options{})
	must(t, s.put(t.Context(), lease(1)))
	v, err := s.read(t.Context())
	must(t, err)
	for range 3 {
		must(t, s.put(t.Context(), lease(2)))
	}
	r, err := s.client.Get(t.Context(), "x")
	must(t, err)
	_, err = s.client.Compact(t.Context(), r.Header.Revision)
	must(t, err)
	if err := s.follow(t.Context(), v, func() { t.Error("changed without history") }); err != nil {
		t.Errorf("error is %v", err)
	}
}

// A node that gives no sign of life loses its lease in the end, and one that does keeps it; a lease that somebody deletes is
// written again.
func TestTimeToLive(t *testing.T) {
	srv := newServer(t)
	s := srv.source(t, Options{TTL: time.Second})
	defer keep(s, lease(1), nil)()
	stop := keep(s, lease(2), nil)
	updates, err := s.Watch(t.Context())
	must(t, err)
	wait(t, "both", updates, leases(lease(1), lease(2)))
	stop()
	wait(t, "the one that is kept", updates, leases(lease(1)))
	_, err = s.client.Delete(t.Context(), s.key(lease(1).Prefix))
	must(t, err)
	wait(t, "none", updates, leases())
	wait(t, "the one that is kept, again", updates, leases(lease(1)))
	// Nothing else is left behind: one time to live a key.
	for range 300 {
		all, err := s.client.Leases(t.Context())
		must(t, err)
		if len(all.Leases) == 1 {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Error("times to live without a key stay")
}

// A damaged key names itself; nothing is taken away because of it.
func TestDamaged(t *testing.T) {
	srv := newServer(t)
	s := srv.source(t, Options{})
	must(t, s.put(t.Context(), lease(1)))
	updates, err := s.Watch(t.Context())
	must(t, err)
	wait(t, "the lease", updates, leases(lease(1)))
	key := s.key(lease(2).Prefix)
	for name, value := range map[string]string{"no JSON": "{", "another's value": `{"prefix":"10.244.7.0/24","node":"192.168.0.7"}`} {
		_, err = s.client.Put(t.Context(), key, value)
		must(t, err)
		wait(t, name, updates, func(u peers.Update) bool { return u.Err != nil && strings.Contains(u.Err.Error(), "etcdctl del "+key) })
		_, err = s.client.Delete(t.Context(), key)
		must(t, err)
		wait(t, "the lease, without "+name, updates, leases(lease(1)))
	}
	// Its owner repairs it.
	_, err = s.client.Put(t.Context(), s.key(lease(1).Prefix), "?", clientv3.WithIgnoreLease())
	must(t, err)
	defer keep(s, lease(1), nil)()
	wait(t, "the lease, repaired", updates, leases(lease(1)))
}
