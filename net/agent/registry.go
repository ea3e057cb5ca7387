package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"lamina/net/peers"
	"lamina/net/whole"
)

// joinAgain is the pause between two tries to reach a registry.
const joinAgain = time.Second

// known is what a registry said last. An agent that starts while the registry is gone begins with it: its pods and peers may
// be alive.
type known struct {
	Source string        `json:"source"` // which registry
	Self   peers.Lease   `json:"self"`
	Leases []peers.Lease `json:"leases"`
}

func (c Config) knownFile() string { return filepath.Join(c.StateDir, "known.json") }

// remembered reads what was known last.
func (c Config) remembered() (k known, err error) {
	b, err := os.ReadFile(c.knownFile())
	if err == nil {
		err = json.Unmarshal(b, &k)
	}
	return k, err
}

// fits says whether what is remembered is from this agent's registry, and of the lease that the agent is told to have.
func (k known) fits(c *Config) bool {
	told := c.Overlay.Self
	return k.Source == c.SourceName && (!told.Node.IsValid() || told.Node == k.Self.Node) && (!told.Prefix.IsValid() || told.Prefix == k.Self.Prefix) && k.Self.Prefix.IsValid()
}

// join completes the own lease at a registry. One that does not answer is waited for, unless it is known what it said last:
// then why is what is wrong with it.
func (c *Config) join(ctx context.Context, r peers.Registry) (last []peers.Lease, why error, err error) {
	said := ""
	for {
		self, err := r.Join(ctx, c.Overlay.Self)
		if err == nil {
			c.Overlay.Self = self
			return nil, nil, nil
		}
		if !errors.Is(err, peers.ErrUnreachable) {
			return nil, nil, err
		}
		if k, errKnown := c.remembered(); errKnown == nil && k.fits(c) {
			c.Overlay.Self = k.Self
			return k.Leases, err, nil
		}
		if said != err.Error() {
			said = err.Error()
			c.Logf("waiting: %s", said)
		}
		if !sleep(ctx, joinAgain) {
			return nil, nil, ctx.Err()
		}
	}
}

// remember notes what the registry said.
func (a *Agent) remember(leases []peers.Lease) {
	if a.registry == nil {
		return
	}
	k := known{a.cfg.SourceName, a.overlay.Config().Self, leases}
	if a.noted != nil && a.noted.Self == k.Self && slices.Equal(a.noted.Leases, k.Leases) {
		return
	}
	b, err := json.MarshalIndent(k, "", "\t")
	if err == nil {
		if err = os.MkdirAll(a.cfg.StateDir, 0o700); err == nil {
			err = whole.Write(a.cfg.knownFile(), b)
		}
	}
	if err != nil {
		a.problem("state", fmt.Errorf("what is known of peers: %w: an agent that starts while %s is gone will not know them", err, a.cfg.SourceName))
		return
	}
	a.problem("state", nil)
	a.noted = &k
}

// keep has the own lease kept until ctx is done.
func (a *Agent) keep(ctx context.Context) {
	a.registry.Keep(ctx, a.overlay.Config().Self, func(err error) {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.problem("registry", err)
	})
}
