// Package apiserver stands for Kubernetes' API server: it keeps Nodes, Pods, Namespaces and NetworkPolicies in memory and
// answers for them over HTTPS as that does to client-go, as far as an agent asks: get, list, watch (also one that begins
// with a list) and merge patch. Who asks must have the token, and may do what rules of a ClusterRole say.
package apiserver

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"lamina/net/lab"

	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
)

// Options say where it is and for whom.
type Options struct {
	Address   string // host and port
	Cert, Key string // files
	Token     string
	Rules     []rbacv1.PolicyRule
	In        func(func() error) error // makes its socket, such as Do of a lab's node; nil: here
}

// Server is an API server. It ends with the test.
type Server struct {
	opts Options
	t    testing.TB
	http *http.Server

	mu      sync.Mutex
	version int64
	objects map[string]json.RawMessage // by resource/namespace/name
	events  []event
	changed chan struct{} // closed at the next change
}

type event struct {
	version  int64
	resource string
	json.RawMessage
}

// New starts one.
func New(t testing.TB, opts Options) *Server {
	t.Helper()
	s := &Server{opts: opts, t: t, objects: map[string]json.RawMessage{}, changed: make(chan struct{})}
	s.Start()
	t.Cleanup(s.Stop)
	return s
}

// Start starts it again, with what it had.
func (s *Server) Start() {
	s.t.Helper()
	var l net.Listener
	listen := func() (err error) { l, err = net.Listen("tcp", s.opts.Address); return err }
	in := s.opts.In
	if in == nil {
		in = func(f func() error) error { return f() }
	}
	if err := in(listen); err != nil {
		s.t.Fatal(err)
	}
	s.opts.Address = l.Addr().String()
	mux := http.NewServeMux()
	for _, base := range []string{"/api/v1", "/apis/networking.k8s.io/v1"} {
		mux.HandleFunc("GET "+base+"/{resource}", s.list)
		mux.HandleFunc("GET "+base+"/{resource}/{name}", s.get)
		mux.HandleFunc("PATCH "+base+"/{resource}/{name}/{sub}", s.patch)
	}
	server := &http.Server{Handler: mux}
	s.http = server
	go func() { _ = server.ServeTLS(l, s.opts.Cert, s.opts.Key) }() // until Stop
}

// Kubeconfig writes a kubeconfig file for it.
func (s *Server) Kubeconfig(token string) string {
	s.t.Helper()
	path := filepath.Join(s.t.TempDir(), "kubeconfig")
	err := lab.Kubeconfig(path, s.opts.Address, s.opts.Cert, token)
	if err != nil {
		s.t.Fatal(err)
	}
	return path
}

// Allow replaces the rules.
func (s *Server) Allow(rules []rbacv1.PolicyRule) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.opts.Rules = rules
}

// Stop ends it with all connections.
func (s *Server) Stop() { _ = s.http.Close() }

// known is what it serves, by resource.
var known = map[string]runtime.Object{
	"nodes": &corev1.Node{TypeMeta: metav1.TypeMeta{Kind: "Node", APIVersion: "v1"}}, "pods": &corev1.Pod{TypeMeta: metav1.TypeMeta{Kind: "Pod", APIVersion: "v1"}},
	"namespaces":      &corev1.Namespace{TypeMeta: metav1.TypeMeta{Kind: "Namespace", APIVersion: "v1"}},
	"networkpolicies": &networkingv1.NetworkPolicy{TypeMeta: metav1.TypeMeta{Kind: "NetworkPolicy", APIVersion: "networking.k8s.io/v1"}},
}

func resourceOf(o runtime.Object) (string, schema.GroupVersionKind) {
	for resource, k := range known {
		if reflect.TypeOf(k) == reflect.TypeOf(o) {
			return resource, k.GetObjectKind().GroupVersionKind()
		}
	}
	panic(fmt.Sprintf("%T is no object that this server has", o))
}

func kindOf(resource string) (kind, version string) {
	k := known[resource].GetObjectKind().GroupVersionKind()
	return k.Kind, k.GroupVersion().String()
}

func keyOf(resource string, m metav1.Object) string {
	return resource + "/" + m.GetNamespace() + "/" + m.GetName()
}

// Put makes an object, or replaces it.
func (s *Server) Put(o runtime.Object) {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	o = o.DeepCopyObject()
	resource, kind := resourceOf(o)
	o.GetObjectKind().SetGroupVersionKind(kind)
	m, err := meta.Accessor(o)
	if err == nil {
		err = s.set(resource, m, o)
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// set notes an object and its event.
func (s *Server) set(resource string, m metav1.Object, o any) error {
	s.version++
	m.SetResourceVersion(strconv.FormatInt(s.version, 10))
	b, err := json.Marshal(o)
	if err != nil {
		return err
	}
	kind := watch.Modified
	if _, there := s.objects[keyOf(resource, m)]; !there {
		kind = watch.Added
	}
	s.objects[keyOf(resource, m)] = b
	return s.tell(resource, kind, b)
}

func (s *Server) tell(resource string, kind watch.EventType, object json.RawMessage) error {
	b, err := json.Marshal(map[string]any{"type": kind, "object": object})
	s.events = append(s.events, event{s.version, resource, b})
	close(s.changed)
	s.changed = make(chan struct{})
	return err
}

// Delete deletes an object.
func (s *Server) Delete(o runtime.Object) {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	resource, _ := resourceOf(o)
	m, err := meta.Accessor(o)
	if err != nil {
		s.t.Fatal(err)
	}
	was, there := s.objects[keyOf(resource, m)]
	if !there {
		s.t.Fatalf("%s: there is none", keyOf(resource, m))
	}
	delete(s.objects, keyOf(resource, m))
	s.version++
	if err := s.tell(resource, watch.Deleted, was); err != nil {
		s.t.Fatal(err)
	}
}

// Get reads an object into o, which has its name.
func (s *Server) Get(o runtime.Object) {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	resource, _ := resourceOf(o)
	m, err := meta.Accessor(o)
	if err == nil {
		err = json.Unmarshal(s.objects[keyOf(resource, m)], o)
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// refuse answers, and says so, if the caller may not do this.
func (s *Server) refuse(w http.ResponseWriter, r *http.Request, verb, resource string) bool {
	group := ""
	if strings.HasPrefix(r.URL.Path, "/apis/") {
		group = "networking.k8s.io"
	}
	if r.Header.Get("Authorization") != "Bearer "+s.opts.Token {
		fail(w, apierrors.NewUnauthorized("Unauthorized"))
		return true
	}
	s.mu.Lock()
	rules := s.opts.Rules
	s.mu.Unlock()
	allowed := slices.ContainsFunc(rules, func(rule rbacv1.PolicyRule) bool {
		return slices.Contains(rule.APIGroups, group) && slices.Contains(rule.Resources, resource) && slices.Contains(rule.Verbs, verb)
	})
	if !allowed {
		fail(w, apierrors.NewForbidden(schema.GroupResource{Group: group, Resource: resource}, r.PathValue("name"), errors.New("no rule allows "+verb)))
	}
	return !allowed
}

func fail(w http.ResponseWriter, err *apierrors.StatusError) {
	status := err.Status()
	status.Kind, status.APIVersion = "Status", "v1"
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(int(status.Code))
	_ = json.NewEncoder(w).Encode(status)
}

func (s *Server) get(w http.ResponseWriter, r *http.Request) {
	resource, name := r.PathValue("resource"), r.PathValue("name")
	if s.refuse(w, r, "get", resource) {
		return
	}
	s.mu.Lock()
	b, there := s.objects[resource+"//"+name]
	s.mu.Unlock()
	if !there {
		fail(w, apierrors.NewNotFound(schema.GroupResource{Resource: resource}, name))
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(b)
}

func (s *Server) patch(w http.ResponseWriter, r *http.Request) {
	resource, name := r.PathValue("resource"), r.PathValue("name")
	if s.refuse(w, r, "patch", resource+"/"+r.PathValue("sub")) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	was, there := s.objects[resource+"//"+name]
	if !there {
		fail(w, apierrors.NewNotFound(schema.GroupResource{Resource: resource}, name))
		return
	}
	var patch json.RawMessage
	n := &corev1.Node{}
	err := json.NewDecoder(r.Body).Decode(&patch)
	if err == nil {
		was, err = jsonpatch.MergePatch(was, patch)
	}
	if err == nil {
		err = json.Unmarshal(was, n)
	}
	if err == nil {
		err = s.set(resource, n, n)
	}
	if err != nil {
		fail(w, apierrors.NewBadRequest(err.Error()))
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(s.objects[resource+"//"+name])
}

func (s *Server) list(w http.ResponseWriter, r *http.Request) {
	resource := r.PathValue("resource")
	if r.URL.Query().Get("watch") == "true" {
		if !s.refuse(w, r, "watch", resource) {
			s.watch(w, r, resource)
		}
		return
	}
	if s.refuse(w, r, "list", resource) {
		return
	}
	kind, version := kindOf(resource)
	items, rv := s.all(resource)
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{"kind": kind + "List", "apiVersion": version, "metadata": map[string]string{"resourceVersion": strconv.FormatInt(rv, 10)}, "items": items})
}

func (s *Server) all(resource string) ([]json.RawMessage, int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	items := []json.RawMessage{}
	for key, b := range s.objects {
		if strings.HasPrefix(key, resource+"/") {
			items = append(items, b)
		}
	}
	return items, s.version
}

func (s *Server) watch(w http.ResponseWriter, r *http.Request, resource string) {
	q := r.URL.Query()
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	rv, _ := strconv.ParseInt(q.Get("resourceVersion"), 10, 64)
	e := json.NewEncoder(w)
	if q.Get("sendInitialEvents") == "true" {
		var items []json.RawMessage
		items, rv = s.all(resource)
		for _, b := range items {
			_ = e.Encode(map[string]any{"type": watch.Added, "object": b})
		}
		object := s.bookmark(resource, rv)
		_ = e.Encode(map[string]any{"type": watch.Bookmark, "object": object})
	}
	for {
		s.mu.Lock()
		var events []event
		for _, ev := range s.events {
			if ev.version > rv && ev.resource == resource {
				events = append(events, ev)
			}
		}
		changed := s.changed
		rv = s.version
		s.mu.Unlock()
		for _, ev := range events {
			if e.Encode(ev.RawMessage) != nil {
				return
			}
		}
		_ = http.NewResponseController(w).Flush()
		select {
		case <-r.Context().Done():
			return
		case <-changed:
		case <-time.After(5 * time.Minute):
			return // as the real one does, sooner or later
		}
	}
}

// bookmark is the object that ends an initial list.
func (s *Server) bookmark(resource string, rv int64) any {
	kind, version := kindOf(resource)
	return map[string]any{"kind": kind, "apiVersion": version, "metadata": map[string]any{
		"resourceVersion": strconv.FormatInt(rv, 10), "annotations": map[string]string{metav1.InitialEventsAnnotationKey: "true"},
	}}
}
