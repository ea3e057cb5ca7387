package uring

import (
	"os"
)

// actorEnv makes the test's program something else: another process, for what is about processes.
const actorEnv = "LAMINA_URING_ACTOR"

func runActor(name string) {
	actors[name]()
	os.Exit(0)
}

var actors = map[string]func(){}
