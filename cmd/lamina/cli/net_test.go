package cli

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
)

// A configuration file stands for flags; what is wrong in it is named with its place.
func TestNetAgentConfig(t *testing.T) {
	l := newLayers(t)
	config := filepath.Join(l.dir, "net.toml")
	agent := func(toml string, args []string, want ...string) {
		t.Helper()
		must(t, os.WriteFile(config, []byte(toml), 0o600))
		l.fails(append([]string{"net", "agent", "--config", config, "--socket", l.path("agent.sock")}, args...), want...)
	}
	agent("peers = \"/nonexistent/peers\"\n", nil, "/nonexistent/peers", "no such file")
	agent("peers = \"/nonexistent/peers\"\n", []string{"--peers", "/elsewhere/peers"}, "/elsewhere/peers") // the command line wins
	agent("vni = \"x\"\n", nil, config, "vni")
	agent("colour = 7\n", nil, config, `"colour"`, "not the name of a flag")
	agent("config = \"x\"\n", nil, config, `"config"`)
	agent("= 1\n", nil, config)
	agent("", nil, "--peers is missing")
	agent("etcd = \"http://127.0.0.1:1\"\n", []string{"--peers", "/x"}, "--etcd and --peers", "one of them")
	agent("kubernetes = true\n", []string{"--node-name", "n"}, "--kubeconfig")
	agent("", []string{"--etcd", "192.168.0.9:2379"}, `"192.168.0.9:2379" is not a URL`)
	agent("", []string{"--etcd", "https://x:1", "--etcd-ca", config}, "--etcd-ca", "no certificate")
	agent("", []string{"--etcd", "https://x:1", "--etcd-key", config}, "--etcd-cert and --etcd-key belong together")
	agent("", []string{"--etcd", "https://x:1", "--etcd-user", "me"}, "--etcd-password-file belong together")
	agent("", []string{"--etcd", "https://x:1", "--pod-network", "x"}, "--pod-network")
	agent("peers = \"/x\"\nfastpath = \"maybe\"\n", nil, "--fastpath=maybe", "auto, on or off")
	if _, err := os.Stat(l.path("agent.sock")); err == nil {
		t.Error("a socket is left")
	}
}

// What the example of a configuration offers is what the agent has.
func TestNetExample(t *testing.T) {
	b, err := os.ReadFile("../../../deploy/examples/net/net.toml")
	must(t, err)
	var lines []string
	for line := range strings.Lines(string(b)) {
		if line = strings.TrimPrefix(line, "# "); strings.Contains(line, " = ") {
			lines = append(lines, line)
		}
	}
	values := map[string]any{}
	must(t, toml.Unmarshal([]byte(strings.Join(lines, "")), &values))
	flags := netAgentCommand().Flags()
	for key, value := range values {
		if f := flags.Lookup(key); f == nil || f.Value.Set(fmt.Sprint(value)) != nil {
			t.Errorf("%s = %v", key, value)
		}
	}
	if len(values) < 5 {
		t.Errorf("%v", values)
	}
}

func TestNetStatusWithoutAgent(t *testing.T) {
	l := newLayers(t)
	r := l.run("net", "status", "--socket", l.path("agent.sock"))
	if r.code != 2 || !strings.Contains(r.err, l.path("agent.sock")) || !strings.Contains(r.err, "start it") || strings.Count(r.err, "\n") != 1 {
		t.Errorf("%d %q", r.code, r.err)
	}
}
