package config_test

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"

	"cgtun/config"
)

// FuzzConfig gives any text to Parse. Whatever it is, every mistake has a place
// inside it, and the keys are found where the toml package has found them.
func FuzzConfig(f *testing.F) {
	for _, pattern := range []string{"../testdata/config/good/*.toml", "../testdata/config/bad/*.toml"} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			f.Fatalf("%s: %d files, %v", pattern, len(files), err)
		}
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(string(data))
		}
	}
	f.Add(config.Example)
	for _, seed := range scanSeeds {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, data string) {
		checkScan(t, data)
		file, err := config.Parse("f", []byte(data))
		if err == nil {
			if len(file.Routes()) == 0 {
				t.Error("a good file without a route")
			}
			return
		}
		var all config.Errors
		if !errors.As(err, &all) || len(all) == 0 {
			t.Fatalf("an error that is no config.Errors: %v", err)
		}
		lines := strings.Count(data, "\n") + 1
		for i, e := range all {
			if e.File != "f" || e.Line < 1 || e.Line > lines || e.Col < 1 || e.Msg == "" {
				t.Errorf("mistake outside of the %d lines: %+v", lines, e)
			}
			if i > 0 && (all[i-1].Line > e.Line || all[i-1].Line == e.Line && all[i-1].Col > e.Col) {
				t.Errorf("not sorted: %v before %v", all[i-1], e)
			}
		}
	})
}

// checkScan compares the keys that scan finds with those of the toml package.
func checkScan(t *testing.T, data string) {
	t.Helper()
	var into map[string]any
	meta, err := toml.Decode(data, &into)
	keys, _ := config.Scan(data) // must not panic or hang on a bad file either
	if err != nil {
		return
	}
	want := meta.Keys()
	if len(keys) == 0 && len(want) == 0 {
		return
	}
	if !reflect.DeepEqual(keys, want) {
		t.Errorf("keys of %q:\n got %q\nwant %q", data, keys, want)
	}
}
