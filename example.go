// Package cgtun holds what lies in the top folder and the program carries with
// it. config is its only caller.
package cgtun

import _ "embed"

// Example is config.toml.example: the commented file that "cgtun init" writes.
//
//go:embed config.toml.example
var Example string
