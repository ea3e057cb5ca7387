// Package stress runs what others wrote to try filesystems: stress-ng's stressors, which check what they read, and the suite by
// which containerd compares a stack of layers with a plain directory.
package stress

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"testing"

	"github.com/containerd/continuity/fs/fstest"

	"lamina/bench/rival"
	"lamina/tests/layers"
	"lamina/tests/mnt"
)

func TestMain(m *testing.M) { mnt.Main(m) }

// stressors are those of stress-ng 0.15 that verify what they read, or make calls that nothing else here makes. Each runs twice at
// once for a second.
var stressors = []string{"hdd", "fpunch", "fallocate", "seek", "iomix", "rename", "dentry", "dir", "link", "xattr", "filename", "msync", "sync-file",
	"sendfile", "open"}

func TestStressNG(t *testing.T) {
	m := mnt.Start(t, rival.Config{Lowers: layers.Generate(t)})
	dir := m.Path("d0", "stress") // below a directory that has to be copied up
	if err := os.Mkdir(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	for _, s := range stressors {
		ctx, cancel := context.WithTimeout(context.Background(), mnt.Timeout)
		cmd := exec.CommandContext(ctx, "stress-ng", "--"+s, "2", "--timeout", "1", "--verify",
			"--temp-path", dir, "--hdd-bytes", "4m", "--iomix-bytes", "8m", "--fallocate-bytes", "4m", "--sync-file-bytes", "1m", "--seek-size", "4m",
			"--sendfile-size", "1m", "--oom-avoid", "--no-rand-seed")
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		cancel()
		if err != nil {
			t.Errorf("%s: %v: %s", s, err, out)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
	text, code := mnt.Lamina(t, "status", "--json", m.Dir)
	var st struct{ Errors uint64 }
	if err := json.Unmarshal([]byte(text), &st); code != 0 || err != nil {
		t.Fatalf("status: %d %v %s", code, err, text)
	}
	if st.Errors != 0 || m.Log() != "" {
		t.Errorf("%d errors, log: %s", st.Errors, m.Log())
	}
}

// stacked applies each change to a new upper layer over those before it.
type stacked struct {
	t      *testing.T
	lowers []string
}

func (s *stacked) TestContext(ctx context.Context) (context.Context, func(), error) {
	s.lowers = mnt.Dirs(s.t, "bottom")
	return ctx, func() {}, nil
}

// Apply shows the result as a mount without an upper layer, as the next container's image.
func (s *stacked) Apply(_ context.Context, a fstest.Applier) (string, func(), error) {
	w := mnt.Start(s.t, rival.Config{Lowers: s.lowers})
	err := a.Apply(w.Dir)
	w.Unmount()
	if err != nil {
		return "", nil, err
	}
	// What the index in the workdir knows of hard links, the layer alone has to say.
	if out, code := mnt.Lamina(s.t, "flatten", "-o", rival.Config{Lowers: s.lowers}.OptionString(), "-o", "workdir="+w.Work, w.Upper); code != 0 {
		s.t.Fatalf("flatten: %d %s", code, out)
	}
	s.lowers = append([]string{w.Upper}, s.lowers...)
	r := mnt.Start(s.t, rival.Config{Lowers: s.lowers, Upper: "-"})
	return r.Dir, r.Unmount, nil
}

func TestLayersOfContinuity(t *testing.T) { fstest.FSSuite(t, &stacked{t: t}) }
