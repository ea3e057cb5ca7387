package peers

import (
	"context"
	"errors"
)

// Registry is a Source at which nodes also say where they are, and that may be gone for a while.
type Registry interface {
	Source
	// Join completes the own lease by what the registry knows or gives, and makes it known to the others. The error is
	// ErrUnreachable if it may be another later without anybody changing this node.
	Join(ctx context.Context, own Lease) (Lease, error)
	// Keep makes sure that the registry has the own lease until ctx is done, and leaves it there then. It tells report what
	// is wrong with the registry, and nil when all is well.
	Keep(ctx context.Context, own Lease, report func(error))
}

// ErrUnreachable says that a registry does not answer; Unreachable makes it of an error.
var ErrUnreachable = errors.New("unreachable")

type unreachable struct{ error }

func (u unreachable) Is(target error) bool { return target == ErrUnreachable }
func (u unreachable) Unwrap() error        { return u.error }

// Unreachable is an error that is ErrUnreachable and says what err says.
func Unreachable(err error) error { return unreachable{err} }
