// Package etcdserver is an etcd to test with, in the test program, that can be stopped and started again on its data.
package etcdserver

import (
	"net/url"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/server/v3/embed"
)

// Server is an etcd of one member. It ends with the test.
type Server struct {
	URL  string
	etcd *embed.Etcd
	tls  transport.TLSInfo
	in   func(func() error) error
	dir  string
	t    testing.TB
}

// New starts an etcd for clients at a URL, whose port may be 0. Its sockets are made by what runs under in, such as Do of a
// lab's node; nil: here. A URL with https needs tls.
func New(t testing.TB, at string, tls transport.TLSInfo, in func(func() error) error) *Server {
	t.Helper()
	if in == nil {
		in = func(f func() error) error { return f() }
	}
	s := &Server{URL: at, tls: tls, in: in, dir: t.TempDir(), t: t}
	t.Cleanup(s.Stop)
	s.Start()
	u, err := url.Parse(at)
	if err != nil {
		t.Fatal(err)
	}
	s.URL = u.Scheme + "://" + s.etcd.Clients[0].Addr().String()
	return s
}

// Start starts it again, at the same address.
func (s *Server) Start() {
	s.t.Helper()
	client, err := url.Parse(s.URL)
	if err != nil {
		s.t.Fatal(err)
	}
	c := embed.NewConfig()
	c.Dir, c.LogLevel, c.Logger = s.dir, "fatal", "zap"
	c.UnsafeNoFsync = true
	c.ListenClientUrls, c.AdvertiseClientUrls = []url.URL{*client}, []url.URL{*client}
	c.ClientTLSInfo = s.tls
	c.ListenPeerUrls = []url.URL{{Scheme: "http", Host: "127.0.0.1:0"}}
	c.EnableGRPCGateway = false      // it would connect from any namespace
	c.TickMs, c.ElectionMs = 20, 200 // leases may then be short
	for i := range 50 {
		if err = s.in(func() (err error) { s.etcd, err = embed.StartEtcd(c); return err }); err == nil || i == 49 {
			break
		}
		time.Sleep(100 * time.Millisecond) // the port of one that was stopped
	}
	if err != nil {
		s.t.Fatal(err)
	}
	<-s.etcd.Server.ReadyNotify()
}

// Stop stops it.
func (s *Server) Stop() {
	if s.etcd != nil {
		s.etcd.Close()
		s.etcd = nil
	}
}

// Delete deletes a key.
func (s *Server) Delete(key string) {
	s.t.Helper()
	if _, err := s.etcd.Server.DeleteRange(s.t.Context(), &etcdserverpb.DeleteRangeRequest{Key: []byte(key)}); err != nil {
		s.t.Fatal(err)
	}
}
