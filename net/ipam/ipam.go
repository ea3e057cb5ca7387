// Package ipam gives out the addresses of a node's pod prefix. What it has given is on disk and nowhere else, so that the
// short-lived CNI plugin and the agent agree, and so that a crash at any instruction leaves every address either free or
// leased.
//
// A lease is a file named ADDRESS.ID in the directory of the prefix; ID is the hash of the container's id and interface
// ([ID]). The name alone says that the address is taken and by whom: a file whose content is damaged still holds its
// address, its container can still be deleted, and no other lease suffers. The content tells the agent about the pod.
//
// A file is written under a temporary name, synced, and renamed, and the directory is synced. Releasing renames it to
// ADDRESS.free, which keeps the address from being given out again before HoldDown has passed: caches on other nodes may
// still know the pod that had it. All that changes the directory holds a lock on its file "lock".
package ipam

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// HoldDown is how long an address rests, unless a Pool says otherwise.
const HoldDown = 30 * time.Second

// Errors that callers tell apart with errors.Is.
var (
	ErrFull    = errors.New("no address left")
	ErrResting = errors.New("the addresses left were released too recently")
	ErrNone    = errors.New("no lease")
	ErrDamaged = errors.New("damaged lease")
)

// Pod is what a lease remembers of the pod that has it.
type Pod struct {
	Container string            `json:"container"`           // the container's id
	Interface string            `json:"interface"`           // its name inside the pod
	Network   string            `json:"network"`             // the name in the CNI configuration
	Netns     string            `json:"netns,omitempty"`     // path of the pod's network namespace
	Namespace string            `json:"namespace,omitempty"` // Kubernetes' names, if there are any
	Name      string            `json:"name,omitempty"`
	UID       string            `json:"uid,omitempty"`    // Kubernetes' too
	Labels    map[string]string `json:"labels,omitempty"` // from the CNI arguments
}

// ID is the name of the attachment: 11 digits that are the same for the same container and interface.
func (p Pod) ID() string {
	sum := sha256.Sum256([]byte(p.Container + "/" + p.Interface))
	return hex.EncodeToString(sum[:])[:idLen]
}

// idLen makes ID and "lam" fit the 15 characters that an interface's name can have.
const idLen = 11

// Lease is an address and the pod that has it.
type Lease struct {
	Address netip.Addr `json:"address"`
	ID      string     `json:"id"`
	Pod
	Err error `json:"-"` // wraps ErrDamaged: only Address and ID are known
}

// Pool is the addresses of one prefix. All methods are safe for concurrent use, by any number of processes.
type Pool struct {
	Dir      string        // where leases are; it is made when it is missing
	Prefix   netip.Prefix  // what they are from
	HoldDown time.Duration // how long a released address rests; negative: not at all; 0: the package's HoldDown
}

// Size is how many pods can have an address. The first and the last address of a prefix are not used, and the second is the
// host's.
func (p Pool) Size() int { return 1<<(p.Prefix.Addr().BitLen()-p.Prefix.Bits()) - 3 }

func (p Pool) first() netip.Addr { return p.Prefix.Masked().Addr().Next().Next() }

// last is the highest address that is given out.
func (p Pool) last() netip.Addr {
	a := p.Prefix.Masked().Addr().AsSlice()
	for bit := p.Prefix.Bits(); bit < len(a)*8; bit++ {
		a[bit/8] |= 0x80 >> (bit % 8)
	}
	end, _ := netip.AddrFromSlice(a)
	return end.Prev()
}

func (p Pool) next(a netip.Addr) netip.Addr {
	if a = a.Next(); a.Compare(p.last()) > 0 || !p.Prefix.Contains(a) {
		return p.first()
	}
	return a
}

func (p Pool) holdDown() time.Duration {
	if p.HoldDown == 0 {
		return HoldDown
	}
	return max(p.HoldDown, 0)
}

const (
	freeSuffix = "free"
	tmpName    = ".new"
	hintName   = ".last" // the address given out last; losing it does no harm
	lockName   = "lock"
)

// locked runs f while no other process changes the directory.
func (p Pool) locked(f func() error) error {
	if err := os.MkdirAll(p.Dir, 0o700); err != nil {
		return fmt.Errorf("leases: %w", err)
	}
	l, err := os.OpenFile(filepath.Join(p.Dir, lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("leases: %w", err)
	}
	defer l.Close()
	for {
		if err = unix.Flock(int(l.Fd()), unix.LOCK_EX); err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("leases: locking %s: %w", l.Name(), err)
	}
	return f()
}

// table is the directory's content.
type table struct {
	leased  map[netip.Addr]string // the ID
	byID    map[string]netip.Addr
	resting []netip.Addr
}

func (p Pool) scan() (table, error) {
	t := table{leased: map[netip.Addr]string{}, byID: map[string]netip.Addr{}}
	names, err := readNames(p.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return t, nil
	}
	if err != nil {
		return t, fmt.Errorf("leases: %w", err)
	}
	for _, name := range names {
		a, id, ok := splitName(name)
		switch {
		case !ok:
		case id == freeSuffix:
			t.resting = append(t.resting, a)
		default:
			t.leased[a], t.byID[id] = id, a
		}
	}
	return t, nil
}

func readNames(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Readdirnames(-1)
}

func splitName(name string) (a netip.Addr, id string, ok bool) {
	dot := strings.LastIndexByte(name, '.')
	if dot <= 0 {
		return a, "", false
	}
	a, err := netip.ParseAddr(name[:dot])
	return a, name[dot+1:], err == nil
}

func (p Pool) path(a netip.Addr, suffix string) string {
	return filepath.Join(p.Dir, a.String()+"."+suffix)
}

// Allocate leases an address to a pod. A pod that has one keeps it, and its lease is written anew. The error is ErrFull or
// ErrResting when there is none to give.
func (p Pool) Allocate(pod Pod) (l Lease, err error) {
	err = p.locked(func() error {
		t, err := p.scan()
		if err != nil {
			return err
		}
		a, again := t.byID[pod.ID()]
		if !again || !p.Prefix.Contains(a) {
			if a, err = p.pick(t); err != nil {
				return err
			}
		}
		l = Lease{Address: a, ID: pod.ID(), Pod: pod}
		return p.write(l)
	})
	return l, err
}

// pick finds an address, the longest unused first as far as it is known.
func (p Pool) pick(t table) (netip.Addr, error) {
	wait, rested, err := p.restingLeft(t)
	if err != nil {
		return netip.Addr{}, err
	}
	a := p.hint()
	for range p.Size() {
		a = p.next(a)
		if _, taken := t.leased[a]; taken {
			continue
		}
		if _, rests := wait[a]; !rests {
			if rested[a] {
				if err := os.Remove(p.path(a, freeSuffix)); err != nil {
					return netip.Addr{}, fmt.Errorf("leases: %w", err)
				}
			}
			return a, nil
		}
	}
	if len(wait) > 0 {
		soonest := slices.Min(slices.Collect(maps.Values(wait)))
		return netip.Addr{}, fmt.Errorf("%s: %w: all %d are leased or resting; the next is free in %s", p.Prefix, ErrResting, p.Size(),
			soonest.Round(time.Second)+time.Second)
	}
	return netip.Addr{}, fmt.Errorf("%s: %w: all %d are leased: delete pods, let the runtime run CNI GC, or give the node a larger prefix",
		p.Prefix, ErrFull, p.Size())
}

// restingLeft says how long each released address has still to rest, and which have rested.
func (p Pool) restingLeft(t table) (wait map[netip.Addr]time.Duration, rested map[netip.Addr]bool, err error) {
	wait, rested = map[netip.Addr]time.Duration{}, map[netip.Addr]bool{}
	for _, a := range t.resting {
		st, err := os.Stat(p.path(a, freeSuffix))
		if err != nil {
			return nil, nil, fmt.Errorf("leases: %w", err)
		}
		age := time.Since(st.ModTime())
		if age < 0 { // the clock was set back: the rest begins anew
			now := time.Now()
			if err := os.Chtimes(p.path(a, freeSuffix), now, now); err != nil {
				return nil, nil, fmt.Errorf("leases: %w", err)
			}
			age = 0
		}
		if age < p.holdDown() {
			wait[a] = p.holdDown() - age
		} else {
			rested[a] = true
		}
	}
	return wait, rested, nil
}

// hint is the address after which to look.
func (p Pool) hint() netip.Addr {
	b, err := os.ReadFile(filepath.Join(p.Dir, hintName))
	if err == nil {
		if a, err := netip.ParseAddr(strings.TrimSpace(string(b))); err == nil && p.Prefix.Contains(a) {
			return a
		}
	}
	return p.last()
}

// write makes the lease durable.
func (p Pool) write(l Lease) error {
	b, err := json.Marshal(l)
	if err != nil {
		return err
	}
	tmp := filepath.Join(p.Dir, tmpName)
	if err := writeSynced(tmp, append(b, '\n')); err != nil {
		return fmt.Errorf("leases: %w", err)
	}
	if err := os.Rename(tmp, p.path(l.Address, l.ID)); err != nil {
		return fmt.Errorf("leases: %w", err)
	}
	_ = os.WriteFile(filepath.Join(p.Dir, hintName), []byte(l.Address.String()), 0o600)
	return p.sync()
}

func writeSynced(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Sync(), f.Close())
}

func (p Pool) sync() error {
	d, err := os.Open(p.Dir)
	if err != nil {
		return fmt.Errorf("leases: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("leases: %w", err)
	}
	return nil
}

// Release ends the leases of an attachment. That there is none is no error.
func (p Pool) Release(id string) error {
	return p.locked(func() error {
		t, err := p.scan()
		if err != nil {
			return err
		}
		found := false
		for a, by := range t.leased {
			if by == id {
				found = true
				if err := p.rest(a, id); err != nil {
					return err
				}
			}
		}
		if !found {
			return nil
		}
		return p.sync()
	})
}

// rest turns a lease into a resting address. The time is set first: a crash between leaves the lease.
func (p Pool) rest(a netip.Addr, id string) error {
	now := time.Now()
	if err := os.Chtimes(p.path(a, id), now, now); err != nil {
		return fmt.Errorf("leases: %w", err)
	}
	if err := os.Rename(p.path(a, id), p.path(a, freeSuffix)); err != nil {
		return fmt.Errorf("leases: %w", err)
	}
	return nil
}

// Find returns the lease of an attachment, or an error that is ErrNone or ErrDamaged.
func (p Pool) Find(id string) (Lease, error) {
	t, err := p.scan()
	if err != nil {
		return Lease{}, err
	}
	a, ok := t.byID[id]
	if !ok {
		return Lease{}, fmt.Errorf("attachment %s: %w in %s", id, ErrNone, p.Dir)
	}
	l := p.read(a, id)
	return l, l.Err
}

// List returns all leases by address. Damaged ones have an Err.
func (p Pool) List() ([]Lease, error) {
	t, err := p.scan()
	if err != nil {
		return nil, err
	}
	leases := make([]Lease, 0, len(t.leased))
	for a, id := range t.leased {
		l := p.read(a, id)
		if errors.Is(l.Err, fs.ErrNotExist) { // released meanwhile
			continue
		}
		leases = append(leases, l)
	}
	slices.SortFunc(leases, func(a, b Lease) int { return a.Address.Compare(b.Address) })
	return leases, nil
}

func (p Pool) read(a netip.Addr, id string) Lease {
	path := p.path(a, id)
	var l Lease
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Lease{Address: a, ID: id, Err: err}
	}
	if err == nil {
		err = json.Unmarshal(b, &l)
	}
	if err == nil && (l.Address != a || l.ID != id || l.Pod.ID() != id) {
		err = errors.New("its content belongs to another name")
	}
	if err != nil {
		return Lease{Address: a, ID: id, Err: fmt.Errorf("%s: %w (%w): its pod keeps the address; delete the pod, or the file if there is no interface lam%s",
			path, ErrDamaged, err, id)}
	}
	return l
}

// Resting is how many addresses wait to be given out again.
func (p Pool) Resting() (int, error) {
	t, err := p.scan()
	if err != nil {
		return 0, err
	}
	wait, _, err := p.restingLeft(t)
	return len(wait), err
}
