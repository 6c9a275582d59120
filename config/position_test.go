package config_test

import (
	"testing"

	"cgtun/config"
)

// scanSeeds are files in whose keys and values a scanner can lose its way.
var scanSeeds = []string{
	"",
	"a = 1",
	"\ufeffa = 1\nb = 2",
	"a.b.c = 1\na.b.d = 2\n[x]\n  y = [ 1, # no ] here\n 2, ]\nz=3",
	"\"a.b\".'c]d' = '''\n'x = 1'''''\nnext = \"\"\"\\\"\"\"\\\"\"\"\"\"\nlast = 1",
	"[ a . \"b\\u0063\" ]\nk = {x = 1, y.z = [{p = 1}, {p = {q = 2}}], }\n[[t]]\n[[t]]\nk=1\n[t.u]\nk=2\n[[t.v]]\nk=3\n[[t.v]]\n[[t]]\n[[t.v]]\nk=4",
	"d = 1979-05-27 07:32:00Z # c\ne = [1979-05-27, 07:32:00]\nf = -inf\r\ng = 0xff_ff\r\n",
	"\"\" = 1\n'' .a = 2",
	"s = \"a # b \\\" c = d\"\nr = 'a \\'\nt = \"\"\"a\\\n  b = 1\n\"\"\"\n",
	"a = [[1, 2], [[{b = 1}]], [{c = [{d = 1}]}]]",
}

func TestScanFindsTheKeysOfTheTOMLPackage(t *testing.T) {
	for _, data := range scanSeeds {
		checkScan(t, data)
	}
}

func TestPlaces(t *testing.T) {
	const file = "a = 1\n" + // 1
		"[select]\n" + // 2
		"cgroups = [ '/a',\n" + // 3
		"  \"/b\"]\n" + // 4
		"[[rule]]\n" + // 5
		"use = 'x'\n" + // 6
		"[[rule]]\n" + // 7
		"  port = [1, {p = 2}]\n" + // 8
		"[dns.hosts]\n" + // 9
		"\"a.b\" = ['1.1.1.1', '2.2.2.2']\n" + // 10
		"[[rule.sub]]\n" + // 11
		"[[rule.sub]]\n" + // 12
		"k.l.m = 3\n" // 13
	for _, tt := range []struct {
		path string
		want [4]int // line and column of the key, of the value
	}{
		{"a", [4]int{1, 1, 1, 5}},
		{"select", [4]int{2, 2, 2, 2}},
		{"select.cgroups", [4]int{3, 1, 3, 11}},
		{"select.cgroups[0]", [4]int{3, 13, 3, 13}},
		{"select.cgroups[1]", [4]int{4, 3, 4, 3}},
		{"select.create", [4]int{2, 2, 2, 2}},
		{"rule", [4]int{5, 3, 5, 3}},
		{"rule[0]", [4]int{5, 3, 5, 3}},
		{"rule[0].use", [4]int{6, 1, 6, 7}},
		{"rule[1]", [4]int{7, 3, 7, 3}},
		{"rule[1].use", [4]int{7, 3, 7, 3}},
		{"rule[1].port[1].p", [4]int{8, 15, 8, 19}},
		{"dns", [4]int{9, 2, 9, 2}},
		{"dns.hosts", [4]int{9, 6, 9, 6}},
		{`dns.hosts."a.b"[1]`, [4]int{10, 21, 10, 21}},
		{"rule[1].sub[1].k", [4]int{13, 1, 13, 1}},
		{"rule[1].sub[1].k.l.m", [4]int{13, 5, 13, 9}},
		{"rule[1].sub[0].k", [4]int{11, 8, 11, 8}},
		{"nowhere.at.all", [4]int{1, 1, 1, 1}},
		{"", [4]int{1, 1, 1, 1}},
	} {
		_, place := config.Scan(file)
		if got := place(tt.path); got != tt.want {
			t.Errorf("%s is at %v, want %v", tt.path, got, tt.want)
		}
	}
}

func TestNearestKey(t *testing.T) {
	known := []string{"cgroups", "create", "docker", "by", "use"}
	for _, tt := range []struct{ key, want string }{
		{"cgroup", "cgroups"},
		{"crate", "create"},
		{"crgoups", "cgroups"},
		{"Docker", "docker"},
		{"ues", "use"},
		{"bz", "by"},
		{"foo", ""},
		{"interfaces", ""},
		{"", ""},
	} {
		if got := config.Nearest(tt.key, known); got != tt.want {
			t.Errorf("nearest of %q is %q, want %q", tt.key, got, tt.want)
		}
	}
}
