package cli

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"lamina/doctor"
	"lamina/pool"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func doctorCommand() *cobra.Command {
	var opt doctor.Options
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor [--json] [--root DIR] [--only files|net] [DIR]",
		Short: "check what this machine lacks for Lamina",
		Long: `Checks the kernel and its modules, FUSE passthrough and io_uring, rights and limits, the configuration of containerd,
Podman and Docker, and the filesystem that DIR lies on, where upper layers are to be. It says what is missing, what that
costs and how to fix it. In DIR it makes a directory, mounts a small union in it, writes, reads, and takes both away again.

Where something of the container network is set up (/etc/lamina/net.toml, a CNI configuration that names lamina-cni, or an
agent) it also checks the agent, the kernel's VXLAN, nftables and TCX, forwarding, connection tracking, other firewalls, CNI
configuration and plugins, MTU, and what other pod networks have left. --only looks at one of the two alone.

Each finding is ok, note (nothing is lost), costs (it works, slower or with less than it could) or broken.

With --json the output is one object with the worst level and an array of findings.`,
		Example: `  lamina doctor /var/lib/lamina
  lamina doctor --root /host --json
  lamina doctor --only net`,
		Args: optional(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				dir, err := filepath.Abs(args[0])
				if err != nil {
					return withCode(exitTrouble, err)
				}
				opt.Dir = dir
			}
			if !slices.Contains([]string{"", doctor.Files, doctor.Net}, opt.Only) {
				return withCode(exitTrouble, fmt.Errorf("--only %s: use files or net", opt.Only))
			}
			return examine(cmd.OutOrStdout(), opt, asJSON)
		},
	}
	fs := cmd.Flags()
	fs.BoolVar(&asJSON, "json", false, "print JSON")
	fs.StringVar(&opt.Root, "root", "", "look for files and sockets below this directory, such as a host's root mounted in a container")
	fs.StringVar(&opt.Only, "only", "", "check for the filesystem (files) or for the container network (net) alone")
	_ = cmd.RegisterFlagCompletionFunc("only", cobra.FixedCompletions([]string{doctor.Files, doctor.Net}, cobra.ShellCompDirectiveNoFileComp))
	fs.StringVar(&opt.ContainerdConfig, "containerd-config", "", "containerd's configuration instead of /etc/containerd/config.toml")
	fs.StringVar(&opt.ContainerdSocket, "containerd-address", "", "containerd's socket instead of the one that its configuration names")
	fs.StringVar(&opt.StorageConf, "storage-conf", "", "Podman's configuration of its storage instead of /etc/containers/storage.conf")
	fs.StringVar(&opt.DaemonJSON, "daemon-json", "", "Docker's configuration instead of /etc/docker/daemon.json")
	return cmd
}

// Exit statuses of doctor.
const (
	exitCosts  = 1
	exitBroken = 2
)

func examine(w io.Writer, opt doctor.Options, asJSON bool) error {
	all := doctor.Run(opt)
	if opt.Dir != "" && opt.Root == "" && opt.Only != doctor.Net && doctor.Worst(all) < doctor.Broken {
		all = append(all, trialMount(opt.Dir))
	}
	worst := doctor.Worst(all)
	var err error
	if asJSON {
		err = printJSON(w, struct {
			Worst    doctor.Level     `json:"worst"`
			Findings []doctor.Finding `json:"findings"`
		}{worst, all})
	} else {
		err = printFindings(w, all)
	}
	switch {
	case err != nil:
		return withCode(exitTrouble, err)
	case worst == doctor.Broken:
		return &exitError{code: exitBroken}
	case worst == doctor.Costs:
		return &exitError{code: exitCosts}
	}
	return nil
}

func printFindings(w io.Writer, all []doctor.Finding) error {
	var b strings.Builder
	for _, f := range all {
		fmt.Fprintf(&b, "%-7s %-19s %s\n", f.Level, f.Check, f.Found)
		for _, more := range []struct{ title, text string }{{"cost", f.Cost}, {"fix", f.Fix}} {
			if more.text != "" {
				fmt.Fprintf(&b, "%27s %s: %s\n", "", more.title, more.text)
			}
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// trialMount mounts a union below dir, as an engine would, and uses it.
func trialMount(dir string) doctor.Finding {
	f := doctor.Finding{Check: "trial", Found: "mounted a union, wrote and read in it"}
	st, err := tryMount(dir)
	if err != nil {
		f.Level, f.Found, f.Cost, f.Fix = doctor.Broken, oneLine(err), "containers cannot start", "see the findings above"
		return f
	}
	f.Found += ": transport " + st.Transport + ", passthrough " + st.Passthrough
	if reasons := strings.TrimPrefix(strings.TrimSuffix(st.TransportReason+"; "+st.PassthroughReason, "; "), "; "); reasons != "" {
		f.Level, f.Cost = doctor.Costs, reasons
	}
	return f
}

func tryMount(dir string) (st *pool.Status, err error) {
	scratch, err := os.MkdirTemp(dir, ".lamina-doctor-")
	if err != nil {
		return nil, err
	}
	mnt := scratch + "/m"
	defer func() { err = errors.Join(err, os.RemoveAll(scratch)) }()
	for _, d := range []string{"/l", "/u", "/w", "/m"} {
		if err := os.Mkdir(scratch+d, 0o755); err != nil {
			return nil, err
		}
	}
	want := bytes.Repeat([]byte("lamina\n"), 100_000)
	if err := os.WriteFile(scratch+"/l/file", want, 0o644); err != nil {
		return nil, err
	}
	cmd := exec.Command("/proc/self/exe", "mount", "-o", "lowerdir=l,upperdir=u,workdir=w", "m")
	cmd.Args[0], cmd.Dir = "lamina", scratch
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("mounting a union in %s: %s (%w)", dir, bytes.TrimSpace(out), err)
	}
	defer func() {
		if uerr := umount(mnt, false); uerr != nil {
			err = errors.Join(err, uerr, umount(mnt, true))
		}
	}()
	if err := useMount(mnt, want); err != nil {
		return nil, err
	}
	all, err := pool.MountsOn(mnt)
	if err != nil || len(all) == 0 {
		return nil, errors.Join(fmt.Errorf("the server of %s does not answer", mnt), err)
	}
	return &all[0], nil
}

// useMount makes a sketch and a new file, and reads both.
func useMount(mnt string, want []byte) error {
	f, err := os.OpenFile(mnt+"/file", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt([]byte("L"), 70_000)
	if err = errors.Join(err, f.Sync(), f.Close(), os.WriteFile(mnt+"/new", want, 0o600)); err != nil {
		return err
	}
	for name, at := range map[string]int{"/file": 70_000, "/new": -1} {
		got, err := os.ReadFile(mnt + name)
		if err != nil {
			return err
		}
		expected := bytes.Clone(want)
		if at >= 0 {
			expected[at] = 'L'
		}
		if !bytes.Equal(got, expected) {
			return fmt.Errorf("%s: what was read is not what was written", mnt+name)
		}
	}
	return unix.Unlink(mnt + "/file")
}
