package agent

import (
	"encoding/json"
	"net/http"

	"lamina/net/control"
)

// server answers on the control socket.
func (a *Agent) server() *http.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+control.NodePath, func(w http.ResponseWriter, _ *http.Request) { answer(w, a.node(), nil) })
	mux.HandleFunc("GET "+control.StatusPath, func(w http.ResponseWriter, _ *http.Request) {
		s, err := a.status()
		answer(w, s, err)
	})
	mux.HandleFunc("GET "+control.TracePath, func(w http.ResponseWriter, r *http.Request) {
		f, err := control.ParseFlow(r.FormValue("flow"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		t, err := a.trace(f)
		answer(w, t, err)
	})
	mux.HandleFunc("POST "+control.PodsPath, func(w http.ResponseWriter, r *http.Request) {
		var p control.Pod
		err := json.NewDecoder(r.Body).Decode(&p)
		if err == nil {
			err = a.podAdded(p)
		}
		answer(w, nil, err)
	})
	mux.HandleFunc("DELETE "+control.PodsPath+"/{id}", func(w http.ResponseWriter, r *http.Request) {
		answer(w, nil, a.podRemoved(r.PathValue("id")))
	})
	return &http.Server{Handler: mux}
}

// answer sends a value, or an error as text.
func answer(w http.ResponseWriter, v any, err error) {
	switch {
	case err != nil:
		http.Error(w, err.Error(), http.StatusInternalServerError)
	case v == nil:
		w.WriteHeader(http.StatusNoContent)
	default:
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(v) // whoever asked has gone
	}
}
