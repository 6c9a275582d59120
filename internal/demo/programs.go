package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/net/proxy"
)

// socksFetch as the first argument makes the demo fetch a URL itself.
const socksFetch = "fetch"

// program is one that the demo runs.
type program struct {
	name  string
	kind  string // what it takes its proxy from
	shown string // the command as a reader would write it
	args  []string
	env   []string
	stdin string
	want  string // the destination of one of its flows
}

// programs are one of each of the four kinds. No packaged program was found
// that knows socks_proxy and nothing else: the third one is our own.
func programs(l *lab) []program {
	self, _ := os.Executable()
	file := "http://" + host + "/file"
	return []program{
		{
			name:  "dirmngr",
			kind:  "dirmngr, the fetcher of GnuPG, takes its proxy from dirmngr.conf alone (and there is none in it)",
			shown: "echo KS_FETCH " + file + " | dirmngr --server",
			args:  []string{"dirmngr", "--homedir", filepath.Join(l.dir, "gnupg"), "--server"},
			stdin: "KS_FETCH " + file + "\nBYE\n",
			want:  ":80",
		}, {
			name:  "python3",
			kind:  "python3's urllib takes the proxy for https from HTTPS_PROXY alone (and that is not set)",
			shown: "python3 -c '…urlopen(\"https://" + host + "/file\")…'",
			args: []string{"python3", "-c", "import sys,urllib.request; " +
				"sys.stdout.buffer.write(urllib.request.urlopen('https://" + host + "/file').read())"},
			env:  []string{"SSL_CERT_FILE=" + filepath.Join(l.dir, "cert.pem")},
			want: ":443",
		}, {
			name:  "demo",
			kind:  "a small client of the demo's own takes its proxy from socks_proxy alone (and that is not set)",
			shown: "demo fetch " + file,
			args:  []string{self, socksFetch, file},
			want:  ":80",
		}, {
			name:  "busybox",
			kind:  "busybox nc, a static binary, takes none at all, and here it speaks IPv6",
			shown: "echo 'GET /file HTTP/1.0' | busybox nc " + web6 + " 80",
			args:  []string{"busybox", "nc", web6, "80"},
			stdin: "GET /file HTTP/1.0\r\n\r\n",
			want:  "[" + web6 + "]:80",
		},
	}
}

// environment is that of the demo without any word about a proxy.
func environment(extra []string) (env []string) {
	for _, e := range os.Environ() {
		name, _, _ := strings.Cut(e, "=")
		if !strings.HasSuffix(strings.ToLower(name), "_proxy") {
			env = append(env, e)
		}
	}
	return append(env, extra...)
}

// fetch is the client that knows socks_proxy alone.
func fetch(from string) error {
	transport := &http.Transport{}
	if at := os.Getenv("socks_proxy"); at != "" {
		u, err := url.Parse(at)
		if err != nil {
			return fmt.Errorf("read socks_proxy: %w", err)
		}
		d, err := proxy.SOCKS5("tcp", u.Host, nil, &net.Dialer{})
		if err != nil {
			return fmt.Errorf("use socks_proxy: %w", err)
		}
		transport.DialContext = d.(proxy.ContextDialer).DialContext
	}
	answer, err := (&http.Client{Transport: transport}).Get(from)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	_, err = io.Copy(os.Stdout, answer.Body)
	return err
}
