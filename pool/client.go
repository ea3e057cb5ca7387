package pool

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"

	"golang.org/x/sys/unix"
)

// ErrNoServer: nobody listens on the socket.
var ErrNoServer = errors.New("no pool server listens")

// Client asks a pool server. It connects when it is first asked, and again when the server was replaced. It is safe for
// concurrent use: requests that wait for one another do so in the server, so each has a connection of its own.
type Client struct {
	Socket string

	mu   sync.Mutex
	idle []*clientConn
}

type clientConn struct {
	*net.UnixConn
	r *bufio.Reader
}

// maxIdle connections are kept.
const maxIdle = 4

// maxTries bounds how often a request is sent to servers that end without an answer.
const maxTries = 3

// Do sends a request and returns the answer. ErrNoServer: there is nobody to ask. A server that ends while it is asked leaves
// open whether it did what it was asked; as all requests may be repeated, they are.
func (c *Client) Do(ctx context.Context, r Request) (Reply, error) {
	for try := 1; ; {
		conn, reused, err := c.get()
		if err != nil {
			return Reply{}, err
		}
		reply, err := conn.do(ctx, r)
		if err == nil && reply.Errno != int(unix.ESHUTDOWN) {
			c.put(conn)
			return reply, reply.err()
		}
		conn.Close()
		switch {
		case err == nil && reused:
			continue // another server may have the socket by now
		case err == nil:
			return reply, reply.err()
		}
		if !reused {
			try++
		}
		if try > maxTries || ctx.Err() != nil {
			return reply, fmt.Errorf("pool server on %s: %w", c.Socket, err)
		}
	}
}

func (c *Client) get() (conn *clientConn, reused bool, err error) {
	c.mu.Lock()
	if n := len(c.idle); n > 0 {
		conn = c.idle[n-1]
		c.idle = c.idle[:n-1]
	}
	c.mu.Unlock()
	if conn != nil {
		return conn, true, nil
	}
	addr, done, err := socketAddr(c.Socket)
	if errors.Is(err, unix.ENOENT) {
		return nil, false, fmt.Errorf("%w on %s", ErrNoServer, c.Socket)
	}
	if err != nil {
		return nil, false, err
	}
	defer done()
	u, err := net.DialUnix("unix", nil, addr)
	if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENOENT) {
		return nil, false, fmt.Errorf("%w on %s", ErrNoServer, c.Socket)
	}
	if err != nil {
		return nil, false, err
	}
	return &clientConn{u, bufio.NewReader(u)}, false, nil
}

func (c *Client) put(conn *clientConn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.idle) < maxIdle {
		c.idle = append(c.idle, conn)
	} else {
		conn.Close()
	}
}

// Close gives the connections up.
func (c *Client) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range c.idle {
		conn.Close()
	}
	c.idle = nil
}

func (c *clientConn) do(ctx context.Context, r Request) (reply Reply, err error) {
	stop := context.AfterFunc(ctx, func() { c.UnixConn.Close() })
	defer func() {
		if !stop() && err == nil {
			err = ctx.Err() // the connection is closed, or about to be
		}
	}()
	line, err := json.Marshal(&r)
	if err != nil {
		return reply, err
	}
	if _, err := c.Write(append(line, '\n')); err != nil {
		return reply, err
	}
	answer, err := c.r.ReadBytes('\n')
	if err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return reply, err
	}
	return reply, json.Unmarshal(answer, &reply)
}
