package uring

import (
	"testing"
	"time"
)

// Spares are made in the background, taken by Open, kept when a pool is closed, and ended when nobody wants them.
func TestKeep(t *testing.T) {
	spares := func() int {
		shared.Lock()
		defer shared.Unlock()
		return len(shared.spares)
	}
	wait := func(n int) {
		t.Helper()
		for deadline := time.Now().Add(30 * time.Second); spares() != n; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%d spares, want %d", spares(), n)
			}
		}
	}
	Keep(1)
	defer Keep(0)
	wait(1)
	shared.Lock()
	spare := shared.spares[0]
	shared.Unlock()
	p, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	if p.threads != spare {
		t.Error("a pool was opened without the spare")
	}
	wait(1) // another one is made
	p.Close()
	if spares() != 1 {
		t.Errorf("%d spares after a pool was closed", spares())
	}
	Keep(0)
	wait(0)
}
