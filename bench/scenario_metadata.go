package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"lamina/bench/report"
	"lamina/bench/rival"
)

var metadata = Scenario{
	Name:  "metadata",
	Title: "Everyday programs on a tree of small files",
	Describes: "The Go distribution's own tree (15 000 files in a full run, a part of it else) lies in a lower layer, as files, as a git " +
		"repository and as an archive. Fresh mount: find -ls; again, with du and git status, when everything has been seen; git " +
		"checkout of a branch that differs in every fifth file; chown -R. Another fresh mount: untar, cp -a of the lower tree, rm -rf of the " +
		"lower tree, rm -rf of what was unpacked. What earlier steps wrote is on the disk before each begins, and lower " +
		"files are in memory. An ext4 without a journal looks at recently removed inodes again for every new file: measure on one with a journal " +
		"(--filesystem ext4).",
	Contenders: []string{"plain", "overlayfs", "overlayfs-metacopy", "fuse-overlayfs", "lamina", "floor"},
	More:       []string{"lamina-dev"},
	Quick:      []string{"plain", "overlayfs", "fuse-overlayfs", "lamina", "floor"},
	Tools:      []Tool{{"go", "golang-go"}, {"git", "git"}, {"tar", "tar"}, {"find", "findutils"}, {"du", "coreutils"}},
	Space:      func(m Mode) int64 { return Pick[int64](m, 1*gib, 4*gib, 4*gib) },
	Weight:     330,
	Run:        runMetadata,
}

// What lies in the layer.
const (
	lowerTree  = "tree"
	lowerRepo  = "repo"
	lowerTar   = "tree.tar"
	otherFiles = "other" // the branch of lowerRepo that is checked out
)

// treeParts are directories of the Go distribution. Its programs and tools are left out: they are large, and few.
func treeParts(m Mode) []string {
	all := []string{"src", "test", "lib", "misc", "doc", "api"}
	some := []string{"src/go", "src/net", "src/encoding"}
	return Pick(m, some, append(some, "src/internal", "src/crypto", "src/runtime"), all)
}

// Operations, as cases of the report.
const (
	findFirst = "find -ls, first"
	findWarm  = "find -ls, again"
	duWarm    = "du -s"
	gitStatus = "git status"
	checkout  = "git checkout"
	chownTree = "chown -R"
	untar     = "untar"
	copyAll   = "cp -a"
	rmLower   = "rm -rf, lower files"
	rmOwn     = "rm -rf, own files"
)

// warmRepeats is how often a round repeats what takes a fraction of a second and changes nothing.
const warmRepeats = 3

func runMetadata(l *Lab) error { return runTree(l, treeParts(l.Mode())) }

func runTree(l *Lab, parts []string) error {
	layer := l.Layer("gotree", func(ctx context.Context, dir string) error { return goTree(ctx, dir, parts) })
	took := l.Metric(report.Metric{Name: "time", Unit: report.Seconds, LessIsBetter: true, Log: true})
	err := l.Rounds(func(c *Contender) error {
		if err := seeAll(l, layer, c); err != nil {
			return err
		}
		err := l.On(c, Setup{Layer: layer, Fresh: true}, func(u *Union) error { return lookAndChange(u, took) })
		if err != nil {
			return err
		}
		return l.On(c, Setup{Layer: layer, Fresh: true}, func(u *Union) error { return createAndRemove(u, took) })
	})
	if d := l.Default(); err == nil && d != nil {
		metadataFigures(took, d.Name)
	}
	return errors.Join(err, l.Drop(layer))
}

func metadataFigures(took *Metric, lamina string) {
	for _, op := range []string{untar, rmLower, checkout} {
		took.RatioAtMost("x overlayfs's time: "+op, Of{lamina, op}, Of{"overlayfs", op}, 1.3)
	}
	for _, op := range []string{untar, rmLower, checkout} {
		took.RatioAtLeast("x faster than fuse-overlayfs: "+op, Of{"fuse-overlayfs", op}, Of{lamina, op}, 4)
	}
	for _, op := range []string{findWarm, duWarm, gitStatus} {
		took.RatioAtMost("x overlayfs's time, warm: "+op, Of{lamina, op}, Of{"overlayfs", op}, 1.05)
	}
	took.RatioAtLeast("x faster than overlayfs: "+chownTree, Of{"overlayfs", chownTree}, Of{lamina, chownTree}, 5)
}

// operation is one case: a program that runs.
type operation struct {
	name string
	run  func() error
}

// lookAndChange measures what reads names, and what changes files that are there.
func lookAndChange(u *Union, took *Metric) error {
	tree, repo := u.Path(lowerTree), u.Path(lowerRepo)
	find := func() error { return u.Command("find", tree, "-ls") }
	du := func() error { return u.Command("du", "-s", tree) }
	status := func() error { return git(u.lab.ctx, repo, "status", "--porcelain") }
	if err := u.steps(took, operation{findFirst, find}); err != nil {
		return err
	}
	// The first git status compares contents wherever inode numbers are not those of the layer, as in the plain copy.
	if err := status(); err != nil {
		return err
	}
	for range warmRepeats {
		if err := u.steps(took, operation{findWarm, find}, operation{duWarm, du}, operation{gitStatus, status}); err != nil {
			return err
		}
	}
	return u.steps(took,
		operation{checkout, func() error { return git(u.lab.ctx, repo, "checkout", "-q", otherFiles) }},
		operation{chownTree, func() error { return u.Command("chown", "-R", "1234:1234", tree) }})
}

// createAndRemove measures what makes names and takes them away.
func createAndRemove(u *Union, took *Metric) error {
	tree, unpacked := u.Path(lowerTree), u.Path("unpacked")
	if err := os.Mkdir(unpacked, 0o755); err != nil {
		return err
	}
	return u.steps(took,
		operation{untar, func() error { return u.Command("tar", "-xf", u.Path(lowerTar), "-C", unpacked) }},
		operation{copyAll, func() error { return u.Command("cp", "-a", tree, u.Path("copy")) }},
		operation{rmLower, func() error { return u.Command("rm", "-rf", tree) }},
		operation{rmOwn, func() error { return u.Command("rm", "-rf", unpacked) }})
}

// steps measures operations one after the other, up to the first that fails. Each starts with nothing left to be written
// to the disk, by those before it or by other contenders.
func (u *Union) steps(m *Metric, ops ...operation) error {
	for _, op := range ops {
		u.lab.Progress("%s", op.name)
		if err := u.Quiet(); err != nil {
			return err
		}
		if err := syncfs(u.ground.dir); err != nil {
			return err
		}
		s, err := u.Time(op.run)
		if err != nil {
			return err
		}
		m.Add(u.Contender, op.name, s.InSeconds())
	}
	return nil
}

// seeAll makes the filesystem below know every name and every byte of the layer, so that what a union adds is what is
// measured.
func seeAll(l *Lab, layer *Layer, c *Contender) error {
	if err := layer.Warm(c); err != nil {
		return err
	}
	dir, err := layer.At(c)
	if err != nil {
		return err
	}
	_, err = rival.Run(l.ctx, "find", dir, "-ls")
	return err
}

// goTree fills dir with parts of the Go distribution, three times: as a tree, as an archive, and as a repository with two
// branches.
func goTree(ctx context.Context, dir string, parts []string) error {
	root, err := goRoot(ctx)
	if err != nil {
		return err
	}
	var has []string
	for _, p := range parts { // packages of distributions leave some out
		if _, err := os.Stat(filepath.Join(root, p)); err == nil {
			has = append(has, p)
		}
	}
	if len(has) == 0 {
		return fmt.Errorf("%s has none of %s: install a whole Go distribution", root, strings.Join(parts, ", "))
	}
	tar, tree, repo := filepath.Join(dir, lowerTar), filepath.Join(dir, lowerTree), filepath.Join(dir, lowerRepo)
	if err := os.Mkdir(tree, 0o755); err != nil {
		return err
	}
	// Dereferenced, as Debian's distribution is one of links to elsewhere.
	if _, err := rival.Run(ctx, "tar", append([]string{"-cf", tar, "--dereference", "--owner=0", "--group=0", "-C", root}, has...)...); err != nil {
		return err
	}
	for _, step := range [][]string{{"tar", "-xf", tar, "-C", tree}, {"chmod", "-R", "u+w", tree}, {"cp", "-a", tree, repo}} {
		if _, err := rival.Run(ctx, step[0], step[1:]...); err != nil {
			return err
		}
	}
	return twoBranches(ctx, repo)
}

// twoBranches makes a repository of dir, with the files as they are on the branch that is checked out. The other one
// differs in a fifth of them.
func twoBranches(ctx context.Context, dir string) error {
	before := [][]string{
		{"init", "-q", "-b", "main"},
		{"add", "--all", "--force", "."},
		{"commit", "-q", "-m", "as it is"},
		{"checkout", "-q", "-b", otherFiles},
	}
	after := [][]string{
		{"add", "--all", "--force", "."},
		{"commit", "-q", "-m", "a fifth changed"},
		{"checkout", "-q", "main"},
		{"repack", "-q", "-a", "-d"}, // one pack, as a clone has
		{"status", "--porcelain"},    // the index knows the files as they now lie
	}
	for _, args := range before {
		if err := git(ctx, dir, args...); err != nil {
			return err
		}
	}
	if err := changeEveryFifth(ctx, dir); err != nil {
		return err
	}
	for _, args := range after {
		if err := git(ctx, dir, args...); err != nil {
			return err
		}
	}
	return nil
}

// changeEveryFifth appends to three of 20 files, and replaces a fourth by one in a new directory.
func changeEveryFifth(ctx context.Context, dir string) error {
	n := 0
	return filepath.WalkDir(dir, func(p string, e os.DirEntry, err error) error {
		switch {
		case err != nil || ctx.Err() != nil:
			return errors.Join(err, ctx.Err())
		case e.IsDir() && e.Name() == ".git":
			return filepath.SkipDir
		case !e.Type().IsRegular():
			return nil
		}
		n++
		switch {
		case n%20 == 0:
			moved := filepath.Join(dir, fmt.Sprintf("moved-%d", n))
			return errors.Join(os.Mkdir(moved, 0o755), os.Rename(p, filepath.Join(moved, e.Name())))
		case n%5 == 0:
			return appendTo(p, "// and a line more\n")
		}
		return nil
	})
}

func appendTo(path, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

// git runs git in dir without the configuration of the user or of the machine, and without work in the background that
// would end up in somebody else's turn.
func git(ctx context.Context, dir string, args ...string) error {
	env := []string{"GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1", "GIT_TERMINAL_PROMPT=0", "git", "-C", dir,
		"-c", "user.name=bench", "-c", "user.email=bench@localhost", "-c", "gc.auto=0", "-c", "maintenance.auto=false", "-c", "core.hooksPath=/dev/null"}
	_, err := rival.Run(ctx, "env", append(env, args...)...)
	return err
}

// goRoot is where the Go distribution lies.
func goRoot(ctx context.Context) (string, error) {
	out, err := rival.Run(ctx, "env", "GOTOOLCHAIN=local", "go", "env", "GOROOT")
	if err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(strings.TrimSpace(out))
}
