package bench

var database = Scenario{Name: "database"}
