package config_test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"cgtun/cgroupsel"
	"cgtun/config"
	"cgtun/dialer"
	"cgtun/rules"
	"cgtun/steer"
)

func page(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../docs/config.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// docRow is a line of a key table.
type docRow struct{ def, typ, meaning, served string }

// TestDocsListEveryKey compares the key tables with the structs: keys,
// defaults, types, and what is served.
func TestDocsListEveryKey(t *testing.T) {
	rows := map[string]docRow{}
	var order []string
	for line := range strings.Lines(page(t)) {
		cells := strings.Split(strings.TrimSpace(line), "|")
		if len(cells) < 7 || !strings.HasPrefix(cells[1], " `") {
			continue
		}
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		path := strings.Trim(cells[1], "`")
		if _, twice := rows[path]; twice || len(cells) != 7 {
			t.Errorf("%s: twice, or with another number of columns: %q", path, line)
		}
		rows[path] = docRow{cells[2], cells[3], cells[4], cells[5]}
		order = append(order, path)
	}
	var want []string
	for _, k := range keys() {
		want = append(want, k.path)
		row, ok := rows[k.path]
		if !ok {
			t.Errorf("%s is not in docs/config.md", k.path)
			continue
		}
		if row.typ != typeWords(k.field) || row.meaning == "" {
			t.Errorf("%s: type %q and meaning %q, want type %q", k.path, row.typ, row.meaning, typeWords(k.field))
		}
		def := "`" + literal(k) + "`"
		if required(k) {
			def = "required"
		}
		if row.def != def {
			t.Errorf("%s: default %s, want %s", k.path, row.def, def)
		}
		if served := row.served == "yes"; served == isNotYet(k.path) || !served && !strings.HasPrefix(row.served, "not yet") {
			t.Errorf("%s: served %q, but on the list of what is not: %t", k.path, row.served, isNotYet(k.path))
		}
	}
	if !slices.Equal(order, want) {
		t.Errorf("keys in another order than in the structs:\n got %q\nwant %q", order, want)
	}
}

// TestDocsExamplesLoad loads each fenced block of all pages.
func TestDocsExamplesLoad(t *testing.T) {
	files, err := filepath.Glob("../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for i, block := range regexp.MustCompile("(?ms)^```toml\n(.*?)^```").FindAllStringSubmatch(string(text), -1) {
			n++
			if _, err := config.Parse(fmt.Sprintf("%s, block %d", file, i+1), []byte(block[1])); err != nil {
				t.Error(err)
			}
		}
	}
	if n < 6 {
		t.Errorf("only %d blocks found", n)
	}
}

// TestDocsErrorsAreReal makes the mistakes of which the page shows the errors.
func TestDocsErrorsAreReal(t *testing.T) {
	_, err := config.Parse("config.toml", []byte("[select]\n\ncrate = true\n\n\n\n[[rule]]\nuse = \"direct\"\ncidr =  \"10.0.0.0/33\"\n"))
	if err == nil {
		t.Fatal("no mistake found")
	}
	for line := range strings.Lines(err.Error()) {
		if !strings.Contains(page(t), "    "+strings.TrimSpace(line)+"\n") {
			t.Errorf("not on the page: %s", line)
		}
	}
}

// required tells whether a table without the key is wrong.
func required(k key) bool {
	header, _ := k.header()
	_, err := config.Parse("f", []byte(header))
	return err != nil && strings.Contains(err.Error(), k.path+" is missing")
}

// isNotYet tells whether a key, or a table that holds it, is on the list of
// what this version does not serve. tls_ca goes with its type.
func isNotYet(path string) bool {
	if path == "outbound.tls_ca" {
		path = "outbound.type"
	}
	// Of the ways in table form one is listed, by its value.
	if key, ok := strings.CutPrefix(path, "route.via."); ok {
		return key == "container"
	}
	for _, listed := range config.NotYet() {
		listed = strings.ReplaceAll(listed, "[]", "")
		if path == listed || strings.HasPrefix(path, listed+".") {
			return true
		}
	}
	return false
}

func typeWords(t reflect.Type) string {
	switch t {
	case reflect.TypeFor[cgroupsel.Docker]():
		return "true, false or text"
	case reflect.TypeFor[steer.Via]():
		return "text or table"
	case reflect.TypeFor[map[string][]netip.Addr]():
		return "table of lists of addresses"
	case reflect.TypeFor[time.Duration]():
		return "duration"
	case reflect.TypeFor[config.Size]():
		return "size"
	case reflect.TypeFor[netip.Addr]():
		return "address"
	case reflect.TypeFor[netip.AddrPort]():
		return "address with port"
	case reflect.TypeFor[dialer.Secret]():
		return "text"
	case reflect.TypeFor[[]netip.Prefix]():
		return "list of prefixes"
	case reflect.TypeFor[[]netip.Addr]():
		return "list of addresses"
	case reflect.TypeFor[[]rules.PortRange]():
		return "list of ports"
	case reflect.TypeFor[[]string]():
		return "list of texts"
	}
	switch t.Kind() {
	case reflect.String:
		return "text"
	case reflect.Bool:
		return "true, false"
	case reflect.Int, reflect.Uint32:
		return "integer"
	}
	return t.String()
}

// literal is a key's default as TOML.
func literal(k key) string {
	v := reflect.ValueOf(k.value)
	switch value := k.value.(type) {
	case netip.Addr, netip.AddrPort, dialer.Secret:
		return `""`
	case time.Duration, config.Size, steer.Via:
		return fmt.Sprintf("%q", fmt.Sprint(value))
	}
	switch v.Kind() {
	case reflect.Slice:
		var elements []string
		for i := range v.Len() {
			elements = append(elements, fmt.Sprintf("%q", v.Index(i)))
		}
		return "[" + strings.Join(elements, ", ") + "]"
	case reflect.Map:
		return "{}"
	case reflect.String:
		return fmt.Sprintf("%q", k.value)
	}
	if k.name == "mask" {
		return fmt.Sprintf("%#x", k.value)
	}
	return fmt.Sprint(k.value)
}
