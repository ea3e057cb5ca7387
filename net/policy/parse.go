package policy

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/validation"
	"k8s.io/apimachinery/pkg/util/intstr"
	k8svalidation "k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

// FileError says what is wrong in a file of policies or pods and what to do about it.
type FileError struct {
	File    string
	Object  string // namespace/name, or "document 2" when it has none
	Field   string // path of the field, empty when the whole document is meant
	Problem string
	Remedy  string
}

func (e *FileError) Error() string {
	s := e.File + ": " + e.Object
	if e.Field != "" {
		s += ": " + e.Field
	}
	return s + ": " + e.Problem + ": " + e.Remedy
}

// maxFile is the size in bytes a file may have; etcd takes no object of this size either.
const maxFile = 4 << 20

// Parse reads the NetworkPolicies of one YAML file, documents apart by "---". Unknown fields are errors, as
// everything is that a Kubernetes API server refuses. The error is a *FileError or joins several; no policy is
// returned with an error.
func Parse(file string, data []byte) ([]*networkingv1.NetworkPolicy, error) {
	if len(data) > maxFile {
		return nil, &FileError{File: file, Object: "file", Problem: fmt.Sprintf("has %d bytes", len(data)),
			Remedy: fmt.Sprintf("split it into files of %d bytes at most", maxFile)}
	}
	var out []*networkingv1.NetworkPolicy
	var errs []error
	seen := map[string]bool{}
	reader := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(data)))
	for n := 1; ; n++ {
		doc, err := reader.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		object := fmt.Sprintf("document %d", n)
		if err != nil {
			return nil, errors.Join(append(errs, &FileError{file, object, "", err.Error(), "correct the YAML"})...)
		}
		if blank(doc) {
			continue
		}
		p, err := parseOne(file, object, doc)
		if err == nil && seen[key(p)] {
			err = &FileError{file, key(p), "metadata.name", "is there twice in this file", "rename or remove one of the two"}
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		seen[key(p)] = true
		out = append(out, p)
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return out, nil
}

func key(p *networkingv1.NetworkPolicy) string { return p.Namespace + "/" + p.Name }

// blank says whether a document holds comments and white space only.
func blank(doc []byte) bool {
	for line := range strings.Lines(string(doc)) {
		line = strings.TrimSpace(line)
		if line != "" && line != "---" && !strings.HasPrefix(line, "#") {
			return false
		}
	}
	return true
}

func parseOne(file, object string, doc []byte) (*networkingv1.NetworkPolicy, error) {
	var kind metav1.TypeMeta
	if err := yaml.Unmarshal(doc, &kind); err != nil {
		return nil, &FileError{file, object, "", oneLine(err), "correct the YAML"}
	}
	if kind.APIVersion != "networking.k8s.io/v1" || kind.Kind != "NetworkPolicy" {
		return nil, &FileError{file, object, "kind", fmt.Sprintf("is %q of apiVersion %q", kind.Kind, kind.APIVersion),
			"only kind NetworkPolicy of apiVersion networking.k8s.io/v1 belongs here, one a document; move anything else out of this directory"}
	}
	p := new(networkingv1.NetworkPolicy)
	if err := unmarshalStrict(doc, p); err != nil {
		name, problem := unknownField(oneLine(err))
		return nil, &FileError{file, objectName(object, p), name, problem, "use the fields and types of networking.k8s.io/v1 NetworkPolicy (`kubectl explain networkpolicy.spec`)"}
	}
	if p.Namespace == "" {
		p.Namespace = metav1.NamespaceDefault
	}
	setDefaults(p)
	if err := Validate(p); err != nil {
		var errs []error
		for _, e := range err.(interface{ Errors() []error }).Errors() {
			errs = append(errs, fileError(file, objectName(object, p), e))
		}
		return nil, errors.Join(errs...)
	}
	return p, nil
}

// unmarshalStrict is yaml.UnmarshalStrict with whole paths in what it says of unknown fields.
func unmarshalStrict(doc []byte, into any) error {
	data, err := yaml.YAMLToJSONStrict(doc)
	if err != nil {
		return err
	}
	strict, err := json.UnmarshalStrict(data, into)
	return errors.Join(append(strict, err)...)
}

func objectName(fallback string, p *networkingv1.NetworkPolicy) string {
	if p.Name == "" {
		return fallback
	}
	if p.Namespace == "" {
		return metav1.NamespaceDefault + "/" + p.Name
	}
	return key(p)
}

// unknownField takes the field's path out of the strict decoder's message, where it has one.
func unknownField(msg string) (name, problem string) {
	const sign = `unknown field "`
	if i := strings.Index(msg, sign); i >= 0 {
		rest := msg[i+len(sign):]
		if j := strings.IndexByte(rest, '"'); j >= 0 {
			return rest[:j], "is no field of a NetworkPolicy"
		}
	}
	return "", msg
}

func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }

func fileError(file, object string, err error) *FileError {
	var fe *field.Error
	if !errors.As(err, &fe) {
		return &FileError{file, object, "", err.Error(), "correct it"}
	}
	remedy, problem := fe.Detail, fmt.Sprintf("is %s", strings.ToLower(fe.Type.String()))
	if v := fmt.Sprint(fe.BadValue); fe.Type == field.ErrorTypeInvalid || fe.Type == field.ErrorTypeNotSupported {
		problem = fmt.Sprintf("is %q", v)
	}
	if fe.Type == field.ErrorTypeNotSupported && remedy == "" {
		remedy = "use a supported value"
	}
	if fe.Type == field.ErrorTypeRequired && remedy == "" {
		remedy = "set it"
	}
	return &FileError{file, object, fe.Field, problem, remedy}
}

// setDefaults does what the API server does to a policy it stores.
func setDefaults(p *networkingv1.NetworkPolicy) {
	if len(p.Spec.PolicyTypes) == 0 {
		p.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}
		if len(p.Spec.Egress) > 0 {
			p.Spec.PolicyTypes = append(p.Spec.PolicyTypes, networkingv1.PolicyTypeEgress)
		}
	}
	tcp := corev1.ProtocolTCP
	fill := func(ports []networkingv1.NetworkPolicyPort) {
		for i := range ports {
			if ports[i].Protocol == nil {
				ports[i].Protocol = &tcp
			}
		}
	}
	for i := range p.Spec.Ingress {
		fill(p.Spec.Ingress[i].Ports)
	}
	for i := range p.Spec.Egress {
		fill(p.Spec.Egress[i].Ports)
	}
}

// Validate says what an API server would refuse. Its errors are *field.Error, each with a remedy for its detail.
func Validate(p *networkingv1.NetworkPolicy) error {
	var errs field.ErrorList
	meta, spec := field.NewPath("metadata"), field.NewPath("spec")
	if p.Name == "" {
		errs = append(errs, field.Required(meta.Child("name"), "give the policy a name"))
	}
	for _, name := range []struct {
		path  *field.Path
		value string
		check func(string) []string
	}{
		{meta.Child("name"), p.Name, k8svalidation.IsDNS1123Subdomain},
		{meta.Child("namespace"), p.Namespace, k8svalidation.IsDNS1123Label},
	} {
		if why := name.check(name.value); name.value != "" && len(why) > 0 {
			errs = append(errs, field.Invalid(name.path, name.value, why[0]))
		}
	}
	errs = append(errs, validSelector(spec.Child("podSelector"), &p.Spec.PodSelector)...)
	types := spec.Child("policyTypes")
	if len(p.Spec.PolicyTypes) > 2 {
		errs = append(errs, field.Invalid(types, p.Spec.PolicyTypes, "list Ingress and Egress once each at most"))
	}
	for i, t := range p.Spec.PolicyTypes {
		if t != networkingv1.PolicyTypeIngress && t != networkingv1.PolicyTypeEgress {
			errs = append(errs, field.NotSupported(types.Index(i), t, []string{"Ingress", "Egress"}))
		}
	}
	for i, r := range p.Spec.Ingress {
		at := spec.Child("ingress").Index(i)
		errs = append(errs, validPorts(at.Child("ports"), r.Ports)...)
		errs = append(errs, validPeers(at.Child("from"), r.From)...)
	}
	for i, r := range p.Spec.Egress {
		at := spec.Child("egress").Index(i)
		errs = append(errs, validPorts(at.Child("ports"), r.Ports)...)
		errs = append(errs, validPeers(at.Child("to"), r.To)...)
	}
	if len(errs) == 0 {
		return nil
	}
	return errs.ToAggregate()
}

func validSelector(at *field.Path, s *metav1.LabelSelector) field.ErrorList {
	errs := validation.ValidateLabelSelector(s, validation.LabelSelectorValidationOptions{}, at)
	if len(errs) > 0 {
		return errs
	}
	// What is left is refused by the selector itself.
	if _, err := metav1.LabelSelectorAsSelector(s); err != nil {
		return field.ErrorList{field.Invalid(at, metav1.FormatLabelSelector(s), oneLine(err))}
	}
	return nil
}

func validPorts(at *field.Path, ports []networkingv1.NetworkPolicyPort) (errs field.ErrorList) {
	for i, p := range ports {
		at := at.Index(i)
		if proto := p.Protocol; proto != nil && *proto != corev1.ProtocolTCP && *proto != corev1.ProtocolUDP && *proto != corev1.ProtocolSCTP {
			errs = append(errs, field.NotSupported(at.Child("protocol"), *proto, []string{"TCP", "UDP", "SCTP"}))
		}
		switch {
		case p.Port == nil:
			if p.EndPort != nil {
				errs = append(errs, field.Required(at.Child("port"), "set port too, the first of the range, or remove endPort"))
			}
		case p.Port.Type == intstr.Int:
			if p.Port.IntVal < 1 || p.Port.IntVal > 65535 {
				errs = append(errs, field.Invalid(at.Child("port"), p.Port.IntVal, "use a number from 1 to 65535"))
			}
			if p.EndPort != nil && (*p.EndPort < p.Port.IntVal || *p.EndPort > 65535) {
				errs = append(errs, field.Invalid(at.Child("endPort"), *p.EndPort, "use a number from port to 65535"))
			}
		default:
			if p.EndPort != nil {
				errs = append(errs, field.Invalid(at.Child("endPort"), *p.EndPort, "remove it: a range begins with a number, and port is a name"))
			}
			if why := k8svalidation.IsValidPortName(p.Port.StrVal); len(why) > 0 {
				errs = append(errs, field.Invalid(at.Child("port"), p.Port.StrVal, why[0]))
			}
		}
	}
	return errs
}

func validPeers(at *field.Path, peers []networkingv1.NetworkPolicyPeer) (errs field.ErrorList) {
	for i, p := range peers {
		at := at.Index(i)
		if p.PodSelector == nil && p.NamespaceSelector == nil && p.IPBlock == nil {
			errs = append(errs, field.Required(at, "give it a podSelector, a namespaceSelector or an ipBlock; `podSelector: {}` means every pod of the namespace"))
			continue
		}
		if p.PodSelector != nil {
			errs = append(errs, validSelector(at.Child("podSelector"), p.PodSelector)...)
		}
		if p.NamespaceSelector != nil {
			errs = append(errs, validSelector(at.Child("namespaceSelector"), p.NamespaceSelector)...)
		}
		if p.IPBlock != nil {
			if p.PodSelector != nil || p.NamespaceSelector != nil {
				errs = append(errs, field.Forbidden(at.Child("ipBlock"), "put it in a list entry of its own: it cannot stand beside selectors"))
			}
			errs = append(errs, validBlock(at.Child("ipBlock"), p.IPBlock)...)
		}
	}
	return errs
}

func validBlock(at *field.Path, b *networkingv1.IPBlock) (errs field.ErrorList) {
	const form = "write an address range as 10.1.0.0/16 or 2001:db8::/64"
	whole, err := netip.ParsePrefix(b.CIDR)
	if err != nil || whole.Addr().Is4In6() {
		return field.ErrorList{field.Invalid(at.Child("cidr"), b.CIDR, form)}
	}
	for i, e := range b.Except {
		at := at.Child("except").Index(i)
		part, err := netip.ParsePrefix(e)
		if err != nil || part.Addr().Is4In6() {
			errs = append(errs, field.Invalid(at, e, form))
		} else if !whole.Contains(part.Addr()) || part.Bits() <= whole.Bits() {
			errs = append(errs, field.Invalid(at, e, "use a part of "+b.CIDR+": an exception lies in its block and is smaller"))
		}
	}
	return errs
}
