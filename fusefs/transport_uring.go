package fusefs

import (
	"errors"
	"fmt"

	"lamina/uring"
)

// uringTransport carries requests over io_uring, and over /dev/fuse what the kernel sends there all the same: FORGET and
// INTERRUPT. Notices go over /dev/fuse too.
type uringTransport struct {
	*devTransport
	conn *uring.Conn
	fd   int // of the connection; go-fuse's, which closes it at the end of devTransport.serve
}

var _ transport = (*uringTransport)(nil)

// openRings gets the threads that serve rings; nil if /dev/fuse is to be used, with the reason unless it was asked for.
func openRings(opt *Options) (*uring.Pool, error, error) {
	if opt.Transport == TransportDev {
		return nil, nil, nil
	}
	reason := uring.Enable()
	if reason == nil {
		var rings *uring.Pool
		if rings, reason = uring.Open(); reason == nil {
			return rings, nil, nil
		}
	}
	return nil, reason, opt.withoutRings(reason)
}

// withoutRings decides whether /dev/fuse will do, and says so once.
func (o *Options) withoutRings(reason error) error {
	if o.Transport == TransportUring {
		return fmt.Errorf("transport=uring: %w", reason)
	}
	o.Logf("transport: requests come over /dev/fuse, which is slower: %v", reason)
	return nil
}

// overRings has requests come over io_uring from now on, or leaves them where they come.
func (t *devTransport) overRings(rings *uring.Pool, fd int, opt *Options) (transport, error) {
	conn, err := rings.Serve(fd, t.srv.answers, uring.Options{Mount: t.options, Init: t.KernelSettings(), Logf: opt.Logf})
	if err == nil {
		return &uringTransport{devTransport: t, conn: conn, fd: fd}, nil
	}
	t.reason = err
	if err = opt.withoutRings(err); err == nil {
		return t, nil
	}
	err = errors.Join(err, t.detach())
	go t.Serve() // ends when the last who has come in meanwhile is gone, and closes the connection
	return nil, err
}

func (t *uringTransport) name() string { return "uring" }

func (t *uringTransport) rings() *uring.Stats {
	s := t.conn.Stats()
	return &s
}

func (t *uringTransport) serve() {
	if err := t.conn.ServeForgets(t.fd); err != nil {
		t.srv.opt.Logf("io_uring: inodes are forgotten one by one: %v", err)
	}
	t.devTransport.serve() // which ends as soon as it begins, unless that failed
	t.conn.Wait()
}
