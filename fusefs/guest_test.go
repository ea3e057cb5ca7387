package fusefs

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"lamina/block"
	"lamina/layer"
	"lamina/union"
)

const guestEnv = "LAMINA_FUSEFS_GUEST"

// guestReport is what a server in a user namespace of its own found.
type guestReport struct {
	Content string
	Written string
	Status  Status
	Log     []string
}

// TestUserNamespace: without privileges in the initial user namespace the mount works, and says why nothing passes
// through.
func TestUserNamespace(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{"lower", "upper", "work", "mnt"} {
		must(t, os.Mkdir(dir+"/"+d, 0o755))
	}
	must(t, os.WriteFile(dir+"/lower/lib.so", []byte(image()), 0o644))
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), guestEnv+"="+dir, "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	self := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 65536}}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS, UidMappings: self, GidMappings: self}
	out, err := cmd.Output()
	must(t, err)
	var rep guestReport
	must(t, json.Unmarshal(out, &rep))
	same(t, "the image", rep.Content, image())
	same(t, "the file after a write", rep.Written, image()+"end")
	if rep.Status.Passthrough != "off" || !strings.Contains(rep.Status.PassthroughReason, "CAP_SYS_ADMIN") {
		t.Errorf("passthrough is %s: %q", rep.Status.Passthrough, rep.Status.PassthroughReason)
	}
	if n := strings.Count(strings.Join(rep.Log, "\n"), "CAP_SYS_ADMIN"); n != 1 {
		t.Errorf("the reason was logged %d times, want once", n)
	}
}

// runGuest is main of a process in its own user and mount namespace.
func runGuest(dir string) {
	var lines logLines
	low, err := layer.OpenDir(dir+"/lower", layer.Options{ReadOnly: true, NS: layer.User})
	check(err)
	up, err := layer.OpenDir(dir+"/upper", layer.Options{NS: layer.User})
	check(err)
	work, err := layer.OpenDir(dir+"/work", layer.Options{NS: layer.User})
	check(err)
	fs, err := union.New(union.Config{Lowers: []layer.Layer{low}, Upper: up, Work: work, NS: layer.User,
		Engine: block.NewEngine(block.Options{}), CopyUp: union.CopyUpBlock})
	check(err)
	s, err := Mount(fs, dir+"/mnt", Options{Logf: lines.add})
	check(err)
	check(refusePoll(dir + "/mnt"))
	var rep guestReport
	for range 2 {
		b, err := os.ReadFile(dir + "/mnt/lib.so")
		check(err)
		rep.Content = string(b)
	}
	f, err := os.OpenFile(dir+"/mnt/lib.so", os.O_WRONLY|os.O_APPEND, 0)
	check(err)
	_, err = f.WriteString("end")
	check(err)
	check(f.Close())
	b, err := os.ReadFile(dir + "/mnt/lib.so")
	check(err)
	rep.Written, rep.Status = string(b), s.Status()
	check(s.Unmount())
	check(fs.Close())
	rep.Log = lines.lines
	out, err := json.Marshal(rep)
	check(err)
	fmt.Println(string(out))
}
