package policy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
	networkingv1 "k8s.io/api/networking/v1"
)

// ControllerOptions say where policies and pods come from.
type ControllerOptions struct {
	// Dir is the directory of policy files; empty: none.
	Dir string
	// PodsFile names the pods and namespaces of the network; empty: none. It need not exist yet.
	PodsFile string
	// Keep is a directory for copies of policies in force: see NewDir.
	Keep string
	// Node holds the prefixes of this node's pods.
	Node []netip.Prefix
	// Report is told of every change of what is wrong: an error, or nil when all is well again. It is called from one
	// goroutine at a time. Nil: Status alone tells.
	Report func(error)
}

// Controller watches the sources and keeps the kernel as they say.
type Controller struct {
	opts     ControllerOptions
	enforcer *Enforcer
	dir      *Dir
	wake     chan struct{}

	syncing sync.Mutex // one pass at a time
	filed   Inventory  // the pods file as it last parsed
	podsRaw []byte     // and its bytes
	said    string     // what Report was told last

	mu      sync.Mutex // what follows
	sources []string   // in the order of their rank, the best last
	known   map[string]Inventory
	given   []*networkingv1.NetworkPolicy // by SetPolicies
	status  Status
}

// Status is what a controller tells of itself.
type Status struct {
	Policies int       `json:"policies"` // in force
	Pods     int       `json:"pods"`     // known in the network
	Local    int       `json:"local"`    // addresses of pods on this node
	Isolated int       `json:"isolated"` // of those, how many a policy selects
	Cut      uint64    `json:"cut"`      // established flows ended by changes, since the agent began
	Changed  time.Time `json:"changed"`  // when rules last changed
	// Dropped are packets: "ingress" and "egress" those that no rule of a pod allowed, "cut" answers to flows that a change ended.
	// They begin at zero when the table is made anew.
	Dropped  map[string]uint64 `json:"dropped"`
	Problems []string          `json:"problems"` // what is wrong now
}

// NewController makes a controller. Nothing is read or enforced before Sync or Run.
func NewController(e *Enforcer, opts ControllerOptions) (*Controller, error) {
	c := &Controller{opts: opts, enforcer: e, wake: make(chan struct{}, 1), known: map[string]Inventory{}}
	var err error
	if opts.Dir != "" {
		c.dir, err = NewDir(opts.Dir, opts.Keep)
	}
	return c, err
}

// SetInventory replaces what one source knows of pods. Sources are ranked by their first call, later ones above earlier
// ones, and all above the pods file: see Merge. The kernel follows at the next Sync, or soon while Run runs.
func (c *Controller) SetInventory(source string, inv Inventory) {
	c.mu.Lock()
	if !slices.Contains(c.sources, source) {
		c.sources = append(c.sources, source)
	}
	c.known[source] = inv
	c.mu.Unlock()
	c.poke()
}

// SetPolicies replaces the policies that are in no file, those of Kubernetes. As SetInventory else.
func (c *Controller) SetPolicies(ps []*networkingv1.NetworkPolicy) {
	c.mu.Lock()
	c.given = slices.Clone(ps)
	c.mu.Unlock()
	c.poke()
}

func (c *Controller) poke() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// Status tells how things are.
func (c *Controller) Status() Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.status
	s.Problems = slices.Clone(s.Problems)
	return s
}

// Sync reads the sources and makes the kernel as they say; when it returns without error the rules of everything that was
// set before are in force. An error in a file is not Sync's: it keeps that file's policy in force and is a problem of
// Status. Sync may be called while Run runs: a pod's address is given out after it.
func (c *Controller) Sync(ctx context.Context) error {
	c.syncing.Lock()
	defer c.syncing.Unlock()
	state, problems := c.gather()
	plan, err := c.enforcer.Plan(state)
	var res Result
	if err == nil {
		res, err = c.enforcer.Apply(ctx, plan)
	}
	c.note(state, plan, res, errors.Join(problems, err))
	return err
}

// gather reads the files and merges everything.
func (c *Controller) gather() (State, error) {
	var errs []error
	var policies []*networkingv1.NetworkPolicy
	if c.dir != nil {
		var err error
		if policies, err = c.dir.Load(); err != nil {
			errs = append(errs, err)
		}
	}
	if err := c.readPods(); err != nil {
		errs = append(errs, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	all := []Inventory{c.filed}
	for _, s := range c.sources {
		all = append(all, c.known[s])
	}
	inv := Merge(all...)
	for _, p := range c.given {
		if i := slices.IndexFunc(policies, func(q *networkingv1.NetworkPolicy) bool { return key(q) == key(p) }); i >= 0 {
			errs = append(errs, fmt.Errorf("policy %s is in Kubernetes, which counts, and in %s: remove it there", key(p), c.opts.Dir))
			policies[i] = p
		} else {
			policies = append(policies, p)
		}
	}
	return State{Node: c.opts.Node, Pods: inv.Pods, Namespaces: inv.Namespaces, Policies: policies}, errors.Join(errs...)
}

// readPods takes the pods file, or keeps what it said. A file that is gone says what it said last, until the agent ends.
func (c *Controller) readPods() error {
	if c.opts.PodsFile == "" {
		return nil
	}
	data, err := os.ReadFile(c.opts.PodsFile)
	if errors.Is(err, fs.ErrNotExist) && len(c.filed.Pods)+len(c.filed.Namespaces) == 0 {
		return nil
	}
	if err != nil {
		return &FileError{c.opts.PodsFile, "file", "", err.Error(), "put it back; without pods write `pods: []`"}
	}
	if c.podsRaw != nil && bytes.Equal(c.podsRaw, data) {
		return nil
	}
	inv, err := ParsePods(c.opts.PodsFile, data)
	if err != nil {
		return err
	}
	c.filed, c.podsRaw = inv, data
	return nil
}

// note updates Status and tells Report when what is wrong has changed.
func (c *Controller) note(s State, plan *Plan, res Result, problem error) {
	c.mu.Lock()
	if plan != nil {
		c.status.Policies, c.status.Pods = len(s.Policies), len(s.Pods)
		c.status.Local, c.status.Isolated = len(plan.rules.pods), 0
		for _, p := range plan.rules.pods {
			if p.profiles != [2]*profile{} {
				c.status.Isolated++
			}
		}
		c.status.Cut += uint64(len(res.Cut))
		if !plan.Empty() {
			c.status.Changed = time.Now()
		}
	}
	c.status.Problems = nil
	for _, e := range flatten(problem) {
		c.status.Problems = append(c.status.Problems, e.Error())
	}
	c.mu.Unlock()
	said := fmt.Sprint(problem)
	if c.opts.Report != nil && said != c.said && (c.said != "" || problem != nil) {
		c.opts.Report(problem)
	}
	c.said = said
}

// flatten takes joined errors apart.
func flatten(err error) []error {
	if err == nil {
		return nil
	}
	if j, ok := err.(interface{ Unwrap() []error }); ok {
		var out []error
		for _, e := range j.Unwrap() {
			out = append(out, flatten(e)...)
		}
		return out
	}
	return []error{err}
}

const (
	// settle is how long after a first event files are read: editors and package managers write in steps.
	settle = 50 * time.Millisecond
	// again is when a pass that failed is repeated, and how often the kernel is looked at for what somebody deleted.
	again = 10 * time.Second
)

// Run keeps the kernel as the sources say until ctx is done, beginning with a Sync. It returns an error only when it cannot
// watch. What it made stays in the kernel when it ends, and what an agent before it made stays until the first Sync: set the
// inventories first, or that Sync takes the pods for gone.
func (c *Controller) Run(ctx context.Context) error {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watching policies: %w: raise fs.inotify.max_user_instances", err)
	}
	defer w.Close()
	tick := time.NewTicker(again)
	defer tick.Stop()
	for {
		// Watch first, read then: what changes in between is seen.
		c.watch(w)
		_ = c.Sync(ctx) // Status and Report tell of it
		if !c.rest(ctx, w, tick.C) {
			return nil
		}
	}
}

// watch adds what is to be watched and exists. A directory that is missing is looked for in its parent.
func (c *Controller) watch(w *fsnotify.Watcher) {
	for _, p := range []string{c.opts.Dir, c.opts.PodsFile} {
		if p == "" {
			continue
		}
		// The parent tells when the thing itself is made or replaced; an error is that it is missing, and ticks look again.
		_ = w.Add(filepath.Dir(filepath.Clean(p)))
		if p == c.opts.Dir {
			_ = w.Add(p)
		}
	}
}

// rest waits for a reason to look again; false when ctx is done.
func (c *Controller) rest(ctx context.Context, w *fsnotify.Watcher, tick <-chan time.Time) bool {
	for {
		select {
		case <-ctx.Done():
			return false
		case <-c.wake:
			return true
		case ev := <-w.Events:
			if c.concerns(ev.Name) {
				return quiet(ctx, w)
			}
		case <-w.Errors: // events were lost
			return true
		case <-tick:
			// Files on some filesystems change without an event, and nobody tells of a flushed table.
			if missing, err := c.enforcer.Missing(ctx); err != nil || len(missing) > 0 {
				_ = c.enforcer.Repair(ctx) // Sync tells of what goes wrong
			}
			return true
		}
	}
}

// concerns says whether a path is one of ours.
func (c *Controller) concerns(path string) bool {
	path = filepath.Clean(path)
	dir := filepath.Clean(c.opts.Dir)
	return c.opts.Dir != "" && (path == dir || filepath.Dir(path) == dir) ||
		c.opts.PodsFile != "" && path == filepath.Clean(c.opts.PodsFile) ||
		filepath.Base(path) == "..data" // a ConfigMap volume has new content
}

// quiet waits until what has begun to change has had time to settle. (Not until nothing changes: what a file's directory
// else holds may change all the time.)
func quiet(ctx context.Context, w *fsnotify.Watcher) bool {
	timer := time.After(settle)
	for {
		select {
		case <-ctx.Done():
			return false
		case <-w.Events:
		case <-timer:
			return true
		}
	}
}
