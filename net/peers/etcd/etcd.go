// Package etcd keeps the nodes' leases in etcd: a [Source] for package peers, and what a node does to have a lease there.
//
// A lease is a key, <prefix>10.244.1.0-24, whose value is the lease as JSON. One key a pod prefix makes etcd the judge of
// who has it: it is created in a transaction that fails when it exists. The key hangs on an etcd lease (a time to live) of a
// day, so that a node that stops for an hour, or whose agent is replaced, is still routed to: its pods are alive. A node that
// never comes back frees its prefix after a day.
package etcd

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"lamina/net/peers"
)

// DefaultPrefix begins the keys of leases.
const DefaultPrefix = "/lamina/net/leases/"

const (
	defaultTTL     = 24 * time.Hour
	requestTimeout = 5 * time.Second
	// resync is how often everything is read although nothing was heard: it finds an etcd that is gone.
	resync = time.Minute
	// probe is how often the own lease is looked at: etcd's client tries again by itself and says nothing when etcd is gone.
	probe = 5 * time.Second
	// backoff is the pause after an error.
	backoff = time.Second
)

// Options say which etcd.
type Options struct {
	// Endpoints are URLs such as http://192.168.0.9:2379. At least one is needed.
	Endpoints []string
	// Prefix begins the keys; empty: DefaultPrefix. Networks with different prefixes know nothing of each other.
	Prefix string
	// TLS for https endpoints; nil: the system's roots and no certificate.
	TLS *tls.Config
	// User and Password, if etcd asks for them.
	User, Password string
	// TTL is how long a lease outlives the last sign of life of its node, in whole seconds; zero: 24 hours.
	TTL time.Duration
	// Resync is how often all leases are read again; zero: a minute.
	Resync time.Duration
}

// Source is a connection to etcd. It may be used from several goroutines.
type Source struct {
	client *clientv3.Client
	opts   Options
}

var _ peers.Source = (*Source)(nil)

// New makes a source. It connects in the background: an etcd that is gone is an update of Watch, not an error here.
func New(opts Options) (*Source, error) {
	if len(opts.Endpoints) == 0 {
		return nil, errors.New("etcd: no endpoint: name at least one, such as http://192.168.0.9:2379")
	}
	if opts.Prefix == "" {
		opts.Prefix = DefaultPrefix
	}
	if !strings.HasSuffix(opts.Prefix, "/") {
		opts.Prefix += "/"
	}
	if opts.TTL == 0 {
		opts.TTL = defaultTTL
	}
	if opts.Resync == 0 {
		opts.Resync = resync
	}
	c, err := clientv3.New(clientv3.Config{Endpoints: opts.Endpoints, TLS: opts.TLS, Username: opts.User, Password: opts.Password,
		DialTimeout: requestTimeout, DialKeepAliveTime: 10 * time.Second, DialKeepAliveTimeout: requestTimeout, Logger: zap.NewNop()})
	if err != nil {
		return nil, fmt.Errorf("etcd %s: %w: check the endpoints", strings.Join(opts.Endpoints, ", "), err)
	}
	return &Source{c, opts}, nil
}

// Close ends the connection. Leases stay in etcd.
func (s *Source) Close() error { return s.client.Close() }

// failed names etcd in an error. Unless etcd refused, it is peers.ErrUnreachable.
func (s *Source) failed(doing string, err error) error {
	name := "etcd " + strings.Join(s.opts.Endpoints, ", ")
	switch {
	case errors.Is(err, rpctypes.ErrAuthFailed), errors.Is(err, rpctypes.ErrPermissionDenied), errors.Is(err, rpctypes.ErrUserEmpty):
		return fmt.Errorf("%s: %s: %w: give a user who may read and write %s", name, doing, err, s.opts.Prefix)
	case errors.Is(err, context.DeadlineExceeded):
		err = fmt.Errorf("no answer within %v", requestTimeout)
	}
	return peers.Unreachable(fmt.Errorf("%s: %s: %w: is it running and reachable?", name, doing, err))
}

func (s *Source) key(p netip.Prefix) string {
	return fmt.Sprintf("%s%s-%d", s.opts.Prefix, p.Addr(), p.Bits())
}

// parse reads a lease and compares it with its key.
func (s *Source) parse(kv *mvccpb.KeyValue) (l peers.Lease, err error) {
	if err = json.Unmarshal(kv.Value, &l); err == nil && s.key(l.Prefix) != string(kv.Key) {
		err = fmt.Errorf("its value is the lease of %s", l.Prefix)
	}
	if err != nil {
		return l, fmt.Errorf("etcd: key %s: %w: delete it (etcdctl del %s), its node writes it anew", kv.Key, err, kv.Key)
	}
	return l, nil
}

// Watch sends all leases, and again whenever they change. An etcd that does not answer is an update with an error; when it
// is back the leases are sent again. The error returned is always nil.
func (s *Source) Watch(ctx context.Context) (<-chan peers.Update, error) {
	out := make(chan peers.Update, 1)
	go func() {
		defer close(out)
		var last *peers.Update
		send := func(u peers.Update) {
			if ctx.Err() == nil && (last == nil || !last.Same(u)) {
				peers.Send(out, u)
				last = &u
			}
		}
		for ctx.Err() == nil {
			v, err := s.read(ctx)
			if err == nil {
				send(v.update(s))
				err = s.follow(ctx, v, func() { send(v.update(s)) })
			}
			if err != nil {
				send(peers.Update{Err: s.failed("reading leases", err)})
				sleep(ctx, backoff)
			}
		}
	}()
	return out, nil
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// view is the leases' keys at a revision.
type view struct {
	kvs      map[string]*mvccpb.KeyValue
	revision int64
}

// read takes a snapshot.
func (s *Source) read(ctx context.Context) (*view, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	r, err := s.client.Get(ctx, s.opts.Prefix, clientv3.WithPrefix())
	if err != nil {
		return nil, err
	}
	v := &view{map[string]*mvccpb.KeyValue{}, r.Header.Revision}
	for _, kv := range r.Kvs {
		v.kvs[string(kv.Key)] = kv
	}
	return v, nil
}

// update makes the view into what a source says: sorted leases, or what is wrong with a key.
func (v *view) update(s *Source) peers.Update {
	leases := []peers.Lease{}
	var errs []error
	for _, kv := range v.kvs {
		l, err := s.parse(kv)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		leases = append(leases, l)
	}
	if len(errs) > 0 {
		slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
		return peers.Update{Err: errors.Join(errs...)}
	}
	slices.SortFunc(leases, func(a, b peers.Lease) int { return strings.Compare(s.key(a.Prefix), s.key(b.Prefix)) })
	return peers.Update{Leases: leases}
}

// follow keeps a view as etcd says and calls changed after each change. It returns nil when a snapshot is due: after a
// while, when ctx is done, or when etcd no longer has the history from the view on.
func (s *Source) follow(ctx context.Context, v *view, changed func()) error {
	ctx, cancel := context.WithTimeout(ctx, s.opts.Resync)
	defer cancel()
	for r := range s.client.Watch(clientv3.WithRequireLeader(ctx), s.opts.Prefix, clientv3.WithPrefix(), clientv3.WithRev(v.revision+1)) {
		if err := r.Err(); ctx.Err() != nil || errors.Is(err, rpctypes.ErrCompacted) {
			return nil
		} else if err != nil {
			return err
		}
		for _, ev := range r.Events {
			if ev.Type == clientv3.EventTypeDelete {
				delete(v.kvs, string(ev.Kv.Key))
			} else {
				v.kvs[string(ev.Kv.Key)] = ev.Kv
			}
		}
		v.revision = r.Header.Revision
		if len(r.Events) > 0 {
			changed()
		}
	}
	return nil
}

// TakenError says that another node has a prefix.
type TakenError struct{ Want, Has peers.Lease }

func (e *TakenError) Error() string {
	return fmt.Sprintf("etcd: prefix %s of node %s: node %s has %s: give this node another prefix, or delete that lease if its node is gone for good",
		e.Want.Prefix, e.Want.Node, e.Has.Node, e.Has.Prefix)
}

// Acquire gives a node a lease of a prefix with so many bits in the network: the one it has (by its address), or the first
// that overlaps no other's. The MAC becomes the lease's. Leases of the node that do not fit, of another network or size, are
// deleted. All nodes must name the same network and bits: prefixes of different sizes could be given out at once and overlap.
func (s *Source) Acquire(ctx context.Context, network netip.Prefix, bits int, node netip.Addr, mac peers.MAC) (peers.Lease, error) {
	if bits < network.Bits() || bits > network.Addr().BitLen() {
		return peers.Lease{}, fmt.Errorf("etcd: prefixes of %d bits in %s: give a number from %d to %d", bits, network, network.Bits(), network.Addr().BitLen())
	}
	for {
		v, err := s.read(ctx)
		if err != nil {
			return peers.Lease{}, s.failed("reading leases", err)
		}
		u := v.update(s)
		if u.Err != nil {
			return peers.Lease{}, u.Err
		}
		want := peers.Lease{Node: node, MAC: mac}
		for _, l := range u.Leases {
			if l.Node == node && l.Prefix.Bits() == bits && network.Contains(l.Prefix.Addr()) && !want.Prefix.IsValid() {
				want.Prefix = l.Prefix
			}
		}
		if !want.Prefix.IsValid() {
			p, ok := free(network.Masked(), bits, u.Leases)
			if !ok {
				return peers.Lease{}, fmt.Errorf("etcd: network %s is full: %d leases leave no prefix of %d bits: use a larger network or smaller prefixes", network, len(u.Leases), bits)
			}
			want.Prefix = p
		}
		err = s.put(ctx, want)
		var taken *TakenError
		if errors.As(err, &taken) {
			continue // another node was faster
		}
		if err == nil {
			err = s.removeOthers(ctx, want, u.Leases)
		}
		return want, err
	}
}

// removeOthers deletes a node's leases but the one it wants: a node has one prefix.
func (s *Source) removeOthers(ctx context.Context, want peers.Lease, all []peers.Lease) error {
	for _, l := range all {
		if l.Node == want.Node && l.Prefix != want.Prefix {
			if err := s.remove(ctx, l); err != nil {
				return err
			}
		}
	}
	return nil
}

// remove deletes a lease.
func (s *Source) remove(ctx context.Context, l peers.Lease) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	if _, err := s.client.Delete(ctx, s.key(l.Prefix)); err != nil {
		return s.failed("deleting the lease of "+l.Prefix.String(), err)
	}
	return nil
}

// free is the first prefix of the network that overlaps no lease.
func free(network netip.Prefix, bits int, leases []peers.Lease) (netip.Prefix, bool) {
	for p := netip.PrefixFrom(network.Addr(), bits); network.Contains(p.Addr()); {
		i := slices.IndexFunc(leases, func(l peers.Lease) bool { return l.Prefix.Overlaps(p) })
		if i < 0 {
			return p, true
		}
		// Go on behind what is in the way: the larger of the two.
		wide := p
		if leases[i].Prefix.Bits() < bits {
			wide = leases[i].Prefix
		}
		next, ok := after(wide)
		if !ok {
			break
		}
		p = netip.PrefixFrom(next, bits)
	}
	return netip.Prefix{}, false
}

// after is the first address behind a prefix; false when there is none.
func after(p netip.Prefix) (netip.Addr, bool) {
	b := p.Masked().Addr().AsSlice()
	for i := range b {
		for j := range 8 {
			if i*8+j >= p.Bits() {
				b[i] |= 0x80 >> j
			}
		}
	}
	last, _ := netip.AddrFromSlice(b)
	next := last.Next()
	return next, next.IsValid()
}

// put writes a lease that is free or the node's own already. It gets its time to live from Keep.
func (s *Source) put(ctx context.Context, l peers.Lease) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	value, err := json.Marshal(l)
	if err != nil {
		return err
	}
	ttl, err := s.client.Grant(ctx, int64(math.Ceil(s.opts.TTL.Seconds())))
	if err != nil {
		return s.failed("writing the lease of "+l.Prefix.String(), err)
	}
	key := s.key(l.Prefix)
	create := clientv3.OpPut(key, string(value), clientv3.WithLease(ttl.ID))
	r, err := s.client.Txn(ctx).If(clientv3.Compare(clientv3.CreateRevision(key), "=", 0)).Then(create).Else(clientv3.OpGet(key)).Commit()
	if err != nil {
		return s.failed("writing the lease of "+l.Prefix.String(), err)
	}
	if r.Succeeded {
		return nil
	}
	kv := r.Responses[0].GetResponseRange().Kvs[0]
	has, err := s.parse(kv)
	if err == nil && has.Node != l.Node {
		s.revoke(ttl.ID)
		return &TakenError{l, has}
	}
	// The node's own, or unreadable: replaced, unless somebody else did meanwhile.
	r, err = s.client.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", kv.ModRevision)).Then(create).Commit()
	if err != nil {
		return s.failed("writing the lease of "+l.Prefix.String(), err)
	}
	if !r.Succeeded {
		s.revoke(ttl.ID)
		return &TakenError{l, has}
	}
	if kv.Lease != 0 {
		s.revoke(clientv3.LeaseID(kv.Lease))
	}
	return nil
}

// revoke lets a time to live go that nothing hangs on; it would end by itself.
func (s *Source) revoke(id clientv3.LeaseID) {
	ctx, cancel := context.WithTimeout(context.Background(), requestTimeout)
	defer cancel()
	_, _ = s.client.Revoke(ctx, id)
}

// Keep has the lease of this node in etcd until ctx is done, and leaves it there then. It writes it, renews it, and writes
// it again when it is gone. What goes wrong is told to report (nil: all is well again); Keep goes on trying. A
// *TakenError means that another node has the prefix, and that neither will be reached until one gives way.
func (s *Source) Keep(ctx context.Context, l peers.Lease, report func(error)) {
	told := "nothing"
	tell := func(err error) {
		if msg := fmt.Sprint(err); ctx.Err() == nil && report != nil && msg != told {
			report(err)
			told = msg
		}
	}
	for ctx.Err() == nil {
		err := s.put(ctx, l)
		tell(err)
		if err == nil {
			err = s.renew(ctx, l)
		}
		if err != nil {
			tell(err)
			sleep(ctx, backoff)
		}
	}
}

// renew keeps the key's time to live up for as long as the key is there and says what it should. It returns nil when the
// key is to be written again.
func (s *Source) renew(ctx context.Context, l peers.Lease) error {
	// A third of the time leaves two more tries.
	tick := time.NewTicker(min(s.opts.TTL/3, s.opts.Resync, probe))
	defer tick.Stop()
	for {
		ok, err := s.renewOnce(ctx, l)
		if err != nil || !ok {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// renewOnce says whether the key is still this node's.
func (s *Source) renewOnce(ctx context.Context, l peers.Lease) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	r, err := s.client.Get(ctx, s.key(l.Prefix))
	if err != nil {
		return false, s.failed("renewing the lease of "+l.Prefix.String(), err)
	}
	if len(r.Kvs) == 0 {
		return false, nil
	}
	if has, err := s.parse(r.Kvs[0]); err != nil || has != l || r.Kvs[0].Lease == 0 {
		return false, nil
	}
	_, err = s.client.KeepAliveOnce(ctx, clientv3.LeaseID(r.Kvs[0].Lease))
	if errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return false, nil
	}
	if err != nil {
		return false, s.failed("renewing the lease of "+l.Prefix.String(), err)
	}
	return true, nil
}
