package survive

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"lamina/bench/rival"
	"lamina/pool"
	"lamina/tests/layers"
	"lamina/tests/mnt"
)

// TestPool: the server of many mounts is killed under programs that write to them, and while it is asked for another one.
func TestPool(t *testing.T) {
	bin, err := rival.BinaryPath()
	if err != nil {
		t.Fatal(err)
	}
	contents := layers.Bytes(3, fileSize)
	d := mnt.Dirs(t, "lower", "run")
	for _, name := range []string{"a", "b"} {
		if err := os.WriteFile(filepath.Join(d[0], name), contents, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	socket := filepath.Join(d[1], "pool.sock")
	cmd := exec.Command(bin, "serve", "--survive", "--socket", socket, "--log", filepath.Join(d[1], "log"))
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	client := &pool.Client{Socket: socket}
	defer client.Close()
	var mounted []string
	t.Cleanup(func() {
		for _, m := range mounted {
			_ = unix.Unmount(m, unix.MNT_DETACH)
		}
		_ = cmd.Process.Signal(unix.SIGTERM)
		select {
		case <-exited:
		case <-time.After(mnt.Timeout):
			t.Error("the supervisor does not end")
			_ = cmd.Process.Kill()
		}
		if t.Failed() {
			log, _ := os.ReadFile(filepath.Join(d[1], "log"))
			t.Logf("%s%s", said.String(), log)
		}
	})
	eventually(t, "the server listens", func() bool {
		_, err := client.Do(context.Background(), pool.Request{Op: pool.OpList})
		return err == nil
	})
	ask := func(r pool.Request) pool.Reply {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), mnt.Timeout)
		defer cancel()
		reply, err := client.Do(ctx, r)
		if err != nil {
			t.Fatalf("%s %s: %v", r.Op, r.Mountpoint, err)
		}
		return reply
	}
	options := map[string][]string{}
	mount := func() string {
		t.Helper()
		m := mnt.Dirs(t, "upper", "work", "merged")
		options[m[2]] = []string{fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", d[0], m[0], m[1])}
		ask(pool.Request{Op: pool.OpMount, Mountpoint: m[2], Options: options[m[2]]})
		mounted = append(mounted, m[2])
		return m[2]
	}
	var workers []*writer
	for i := range 2 {
		dir := mount()
		for k, name := range []string{"a", "b"} {
			workers = append(workers, newWriter(t, dir, name, uint64(2*i+k), contents))
		}
	}
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for i, w := range workers {
		wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					if n >= 100 {
						return
					}
				default:
				}
				if err := w.step(); err != nil {
					t.Errorf("worker %d, step %d: %v", i, n, err)
					return
				}
			}
		})
	}
	for range *deathsFlag {
		time.Sleep(every)
		before := ask(pool.Request{Op: pool.OpList})
		if len(before.Mounts) != len(mounted) {
			t.Errorf("%d mounts, want %d", len(before.Mounts), len(mounted))
		}
		if err := unix.Kill(before.PID, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		// Asked once more it finds them in place.
		for _, m := range mounted {
			ask(pool.Request{Op: pool.OpMount, Mountpoint: m, Options: options[m]})
		}
	}
	close(stop)
	wg.Wait()
	// A server that is killed while it makes a mount leaves it made, or not begun.
	for i := range *deathsFlag {
		pid := ask(pool.Request{Op: pool.OpList}).PID
		kill := time.AfterFunc(time.Duration(i*5)*time.Millisecond, func() { _ = unix.Kill(pid, unix.SIGKILL) })
		m := mount()
		kill.Stop()
		if got, err := os.ReadFile(filepath.Join(m, "a")); err != nil {
			t.Error(err)
		} else if err := same("a", got, contents); err != nil {
			t.Error(err)
		}
	}
	for i, w := range workers {
		if err := w.check(mounted[i/2]); err != nil {
			t.Errorf("worker %d: %v", i, err)
		}
	}
	for _, m := range mounted {
		ask(pool.Request{Op: pool.OpUnmount, Mountpoint: m})
	}
	mounted = nil
	ask(pool.Request{Op: pool.OpQuit})
	select {
	case err := <-exited:
		if err != nil {
			t.Errorf("the supervisor: %v", err)
		}
		exited <- err
	case <-time.After(mnt.Timeout):
		t.Error("the supervisor does not end")
	}
}
