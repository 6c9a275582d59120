package main_test

import (
	"archive/zip"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"cgtun/internal/labtest"
)

// testMirrors: programs that fetch packages, unchanged, from mirrors of the names
// that their own settings have: apt-get and go, in the soak npm and pip, too. (git,
// curl and wget are among steps.)
func (d *dockers) testMirrors() {
	www := filepath.Join(d.dir, "www")
	d.serveDebian(filepath.Join(www, "debian"))
	d.serveModule(filepath.Join(www, "go"))
	extra, more := "", ""
	// Debian's npm is hundreds of packages: it is tried where one is there.
	if _, err := exec.LookPath("npm"); err == nil && labtest.Soak() {
		d.servePackage(filepath.Join(www, "npm"))
		extra += `need "$(readlink -f "$(command -v node)")"; ln -sf "$(readlink -f "$(command -v node)")" $root/bin/node
ln -s /bin/busybox $root/usr/bin/env
cli=$(readlink -f "$(command -v npm)"); lib=$(dirname "$(dirname "$cli")"); mkdir -p "$root$lib"; cp -r "$lib/." "$root$lib"; ln -s "$cli" $root/bin/npm
`
		more += "RUN cd /tmp && npm install --no-audit --no-fund --registry=http://mirror.lab/npm/ ours && grep -c ours node_modules/ours/package.json\n"
	}
	if python := pythonWithPip(); python != "" && labtest.Soak() {
		d.serveWheel(filepath.Join(www, "pip"))
		extra += "python=" + python + "\n" + makePython
		more += "RUN cd /tmp && TMPDIR=/tmp " + python + " -m pip download --trusted-host mirror.lab --index-url http://mirror.lab/pip ours && ls ours-1.0-py3-none-any.whl\n"
	}
	if out, err := exec.Command("sh", "-c", makeTools+extra+`tar -C $root -cf $0/tools.tar .`, d.images).CombinedOutput(); err != nil {
		d.t.Fatalf("make an image with tools: %v: %s", err, out)
	}
	d.docker("import", d.images+"/tools.tar", "tools")
	text := `FROM ` + registry + `/base
FROM tools
COPY --from=0 /bin /bin
COPY --from=0 /lib /lib
COPY --from=0 /lib64 /lib64
COPY --from=0 /etc /etc
RUN apt-get update && apt-get download ours && ls ours_1.0_all.deb
RUN GOPROXY=http://mirror.lab/go GOSUMDB=off GOROOT=/go GOTOOLCHAIN=local HOME=/tmp go mod download -json mirror.lab/ours@v1.0.0 | grep Zip
` + more
	for _, by := range []builder{classic, buildKit} {
		d.built(by, text)
	}
}

// makeTools makes the root file system of the tools.
const makeTools = `set -e
root=$0/tools; mkdir -p $root/bin $root/go $root/tmp $root/etc/apt/apt.conf.d $root/etc/apt/preferences.d $root/etc/apt/trusted.gpg.d \
	$root/var/lib/apt/lists/partial $root/var/cache/apt/archives/partial $root/var/lib/dpkg $root/usr/lib/apt/methods $root/usr/share/dpkg
` + labtest.ImageNeeds + `
for p in /usr/bin/apt-get /usr/bin/apt-config /usr/bin/dpkg /usr/lib/apt/methods/http /usr/lib/apt/methods/store; do need $p; done
echo 'APT::Sandbox::User "root";' >$root/etc/apt/apt.conf.d/lab
echo 'deb [trusted=yes allow-insecure=yes] http://mirror.lab/debian ./' >$root/etc/apt/sources.list
: >$root/var/lib/dpkg/status; cp /usr/share/dpkg/*table $root/usr/share/dpkg/
goroot=$(go env GOROOT); cp "$goroot/bin/go" $root/bin/go; cp "$goroot/VERSION" "$goroot/go.env" $root/go/
`

// pythonWithPip is the program that python3 leads to, "" where it has no pip.
func pythonWithPip() string {
	out, err := exec.Command("python3", "-c", "import os, pip, sys; print(os.path.realpath(sys.executable))").Output()
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(out))
}

// makePython adds $python with its library and pip, without what neither needs.
const makePython = `need "$python"
for dir in $("$python" -c 'import os, pip, sysconfig; print(sysconfig.get_path("stdlib"), os.path.dirname(pip.__file__))'); do
	mkdir -p "$root$dir"
	tar -C "$dir" --exclude=__pycache__ --exclude='*-packages' --exclude=./test --exclude=./idlelib --exclude='./config-*' -cf - . | tar -C "$root$dir" -xf -
done
for f in "$root$("$python" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"/lib-dynload/*.so; do need "${f#"$root"}"; done
`

// serveDebian makes a repository of one package.
func (d *dockers) serveDebian(dir string) {
	d.t.Helper()
	control := "Package: ours\nVersion: 1.0\nArchitecture: all\nMaintainer: nobody <nobody@lab>\nDescription: ours\n"
	d.file(filepath.Join(dir, "ours", "DEBIAN", "control"), control)
	deb := filepath.Join(dir, "ours_1.0_all.deb")
	if out, err := exec.Command("dpkg-deb", "--root-owner-group", "--build", filepath.Join(dir, "ours"), deb).CombinedOutput(); err != nil {
		d.t.Fatalf("make a package: %v: %s", err, out)
	}
	text, err := os.ReadFile(deb)
	if err != nil {
		d.t.Fatal(err)
	}
	d.file(filepath.Join(dir, "Packages"), control+fmt.Sprintf("Filename: ./ours_1.0_all.deb\nSize: %d\nSHA256: %x\n", len(text), sha256.Sum256(text)))
}

// serveModule makes a proxy of one module.
func (d *dockers) serveModule(dir string) {
	d.t.Helper()
	const mod = "module mirror.lab/ours\n"
	at := filepath.Join(dir, "mirror.lab", "ours", "@v")
	d.file(filepath.Join(at, "v1.0.0.info"), `{"Version":"v1.0.0","Time":"2024-01-01T00:00:00Z"}`)
	d.file(filepath.Join(at, "v1.0.0.mod"), mod)
	d.zip(filepath.Join(at, "v1.0.0.zip"), map[string]string{"mirror.lab/ours@v1.0.0/go.mod": mod})
}

// serveWheel makes an index of one package of Python.
func (d *dockers) serveWheel(dir string) {
	d.t.Helper()
	const info, wheel = "ours-1.0.dist-info/", "ours-1.0-py3-none-any.whl"
	d.file(filepath.Join(dir, "ours", "index.html"), "<!DOCTYPE html><a href="+wheel+">"+wheel+"</a>")
	d.zip(filepath.Join(dir, "ours", wheel), map[string]string{
		info + "METADATA": "Metadata-Version: 2.1\nName: ours\nVersion: 1.0\n",
		info + "WHEEL":    "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
		info + "RECORD":   "",
	})
}

// zip makes an archive of some files.
func (d *dockers) zip(name string, files map[string]string) {
	d.t.Helper()
	f, err := os.Create(name)
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	z := zip.NewWriter(f)
	for file, text := range files {
		w, errFile := z.Create(file)
		if errFile == nil {
			_, errFile = w.Write([]byte(text))
		}
		err = errors.Join(err, errFile)
	}
	if err := errors.Join(err, z.Close()); err != nil {
		d.t.Fatal(err)
	}
}

// servePackage makes a registry of one package of npm.
func (d *dockers) servePackage(dir string) {
	d.t.Helper()
	d.file(filepath.Join(dir, "work", "package", "package.json"), `{"name":"ours","version":"1.0.0"}`)
	if out, err := exec.Command("tar", "-C", filepath.Join(dir, "work"), "-czf", filepath.Join(dir, "ours-1.0.0.tgz"), "package").CombinedOutput(); err != nil {
		d.t.Fatalf("%v: %s", err, out)
	}
	d.file(filepath.Join(dir, "ours"), `{"name":"ours","dist-tags":{"latest":"1.0.0"},"versions":{"1.0.0":{"name":"ours","version":"1.0.0","dist":{"tarball":"http://mirror.lab/npm/ours-1.0.0.tgz"}}}}`)
}
