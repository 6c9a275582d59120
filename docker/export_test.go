package docker

// Ways in for tests.
var (
	Listening = listening
	FlagOf    = flagOf
)
