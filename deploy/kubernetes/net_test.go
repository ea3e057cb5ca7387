package kubernetes

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containernetworking/cni/libcni"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// The network's manifest: every document is what it says, and they name each other. (That the ClusterRole is enough is tested in
// net/agent.)
func TestNetManifest(t *testing.T) {
	text, err := os.ReadFile("lamina-net.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var account corev1.ServiceAccount
	var role rbacv1.ClusterRole
	var binding rbacv1.ClusterRoleBinding
	var d appsv1.DaemonSet
	into := map[metav1.TypeMeta]any{
		{APIVersion: "v1", Kind: "ServiceAccount"}:                               &account,
		{APIVersion: "rbac.authorization.k8s.io/v1", Kind: "ClusterRole"}:        &role,
		{APIVersion: "rbac.authorization.k8s.io/v1", Kind: "ClusterRoleBinding"}: &binding,
		{APIVersion: "apps/v1", Kind: "DaemonSet"}:                               &d,
	}
	for document := range bytes.SplitSeq(text, []byte("\n---\n")) {
		var kind metav1.TypeMeta
		if err := yaml.Unmarshal(document, &kind); err != nil {
			t.Fatal(err)
		}
		o, known := into[kind]
		if !known {
			t.Fatalf("a document is a %s of %s, or is there twice", kind.Kind, kind.APIVersion)
		}
		delete(into, kind)
		if err := yaml.UnmarshalStrict(document, o); err != nil {
			t.Errorf("%s: %v", kind.Kind, err)
		}
	}
	if len(into) > 0 {
		t.Fatalf("missing: %v", into)
	}
	checkDaemonSet(t, d)
	subject := rbacv1.Subject{Kind: "ServiceAccount", Name: account.Name, Namespace: account.Namespace}
	if !slices.Equal(binding.Subjects, []rbacv1.Subject{subject}) || binding.RoleRef != (rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role.Name}) {
		t.Errorf("the binding is of %v to %v", binding.Subjects, binding.RoleRef)
	}
	if d.Spec.Template.Spec.ServiceAccountName != account.Name || d.Namespace != account.Namespace {
		t.Errorf("pods of %s have the account %s", d.Namespace, d.Spec.Template.Spec.ServiceAccountName)
	}
	for _, r := range role.Rules {
		for _, verb := range r.Verbs {
			if !slices.Contains([]string{"get", "list", "watch"}, verb) && !slices.Equal(r.Resources, []string{"nodes/status"}) {
				t.Errorf("the account may %s %v", verb, r.Resources)
			}
		}
	}
}

// What install-cni puts on a node is a network that libcni reads, with the portmap plugin if the node has it.
func TestInstallCNI(t *testing.T) {
	bin, conf := t.TempDir(), t.TempDir()
	plugin := filepath.Join(t.TempDir(), "lamina-cni")
	for i, want := range [][]string{{"lamina-cni"}, {"lamina-cni", "portmap"}} {
		if err := os.WriteFile(plugin, []byte{byte(i)}, 0o755); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("sh", "install-cni", bin, conf)
		cmd.Env = append(os.Environ(), "LAMINA_CNI="+plugin)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		list, err := libcni.ConfListFromFile(filepath.Join(conf, "10-lamina.conflist"))
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, p := range list.Plugins {
			got = append(got, p.Network.Type)
		}
		if !slices.Equal(got, want) {
			t.Errorf("plugins %v, not %v", got, want)
		}
		if b, err := os.ReadFile(filepath.Join(bin, "lamina-cni")); err != nil || !bytes.Equal(b, []byte{byte(i)}) {
			t.Errorf("the plugin is %v, %v", b, err)
		}
		if err := os.WriteFile(filepath.Join(bin, "portmap"), nil, 0o755); err != nil {
			t.Fatal(err)
		}
		for dir, want := range map[string]int{bin: 2, conf: 1} {
			if entries, err := os.ReadDir(dir); err != nil || len(entries) != want {
				t.Errorf("%s has %v, %v", dir, entries, err)
			}
		}
	}
}
