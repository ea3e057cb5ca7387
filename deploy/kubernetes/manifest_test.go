// Package kubernetes holds what installs Lamina on the nodes of a cluster.
package kubernetes

import (
	"os"
	"os/exec"
	"slices"
	"testing"

	"lamina/cmd/lamina/cli"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"
)

// A field that Kubernetes does not know would be left out by the API server, or refused, on somebody's cluster.
func TestManifest(t *testing.T) {
	text, err := os.ReadFile("lamina.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var d appsv1.DaemonSet
	if err := yaml.UnmarshalStrict(text, &d); err != nil {
		t.Fatal(err)
	}
	if d.APIVersion != "apps/v1" || d.Kind != "DaemonSet" {
		t.Errorf("it is a %s of %s", d.Kind, d.APIVersion)
	}
	checkDaemonSet(t, d)
	if out, err := exec.Command("sh", "-n", "install-node").CombinedOutput(); err != nil {
		t.Errorf("install-node: %v: %s", err, out)
	}
}

// checkDaemonSet looks for names that do not fit each other.
func checkDaemonSet(t *testing.T, d appsv1.DaemonSet) {
	t.Helper()
	pod := d.Spec.Template
	for k, v := range d.Spec.Selector.MatchLabels {
		if pod.Labels[k] != v {
			t.Errorf("pods do not have the label %s=%s that selects them", k, v)
		}
	}
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		if len(c.Args) > 0 { // of lamina, the image's program
			command, flags, err := cli.Command().Find(c.Args)
			if err == nil {
				err = command.ParseFlags(flags)
			}
			if err != nil || !command.Runnable() {
				t.Errorf("container %s: lamina %q: %v", c.Name, c.Args, err)
			}
		}
		for _, m := range c.VolumeMounts {
			if !slices.ContainsFunc(pod.Spec.Volumes, func(v corev1.Volume) bool { return v.Name == m.Name }) {
				t.Errorf("container %s mounts a volume %s that there is not", c.Name, m.Name)
			}
		}
	}
}
