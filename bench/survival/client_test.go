package survival_test

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"cgtun/internal/labtest"
)

// A body is sent in parts, 2 MB a second.
const part, partEvery = 64 << 10, 32 * time.Millisecond

// client is what the client does: so many downloads at seeded times, one in each
// part of the time, as a build has nearly always something under way.
type client struct {
	N      int
	Seed   uint64
	Within time.Duration
}

// download is what became of one.
type download struct {
	Begin, End time.Time
	Connect    time.Duration
	TLS        bool
	Got, Want  int64
	Err        string
}

func (c client) run() error {
	random := rand.New(rand.NewPCG(c.Seed, 2))
	var all sync.WaitGroup
	var mu sync.Mutex
	fmt.Println("ready")
	every := c.Within / time.Duration(c.N)
	for n := range c.N {
		at := time.Duration(n)*every + time.Duration(random.Int64N(int64(every)))
		d := download{Want: 1e6 + random.Int64N(4e6), TLS: random.IntN(2) == 0}
		all.Go(func() {
			time.Sleep(at)
			d.do()
			mu.Lock()
			defer mu.Unlock()
			_ = json.NewEncoder(os.Stdout).Encode(d)
		})
	}
	all.Wait()
	return nil
}

// do downloads, once.
func (d *download) do() {
	d.Begin = time.Now()
	if err := d.fetch(); err != nil {
		d.Err = err.Error()
	}
	d.End = time.Now()
}

func (d *download) fetch() error {
	to := net.JoinHostPort(far, plainPort)
	if d.TLS {
		to = net.JoinHostPort(far, tlsPort)
	}
	c, err := net.DialTimeout("tcp", to, 30*time.Second)
	d.Connect = time.Since(d.Begin)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	if d.TLS {
		c = tls.Client(c, &tls.Config{InsecureSkipVerify: true}) // the name is of no interest here
	}
	if _, err := fmt.Fprintf(c, "GET /%d HTTP/1.1\r\nHost: a.example\r\n\r\n", d.Want); err != nil {
		return fmt.Errorf("ask: %w", err)
	}
	r := bufio.NewReader(c)
	for line := ""; line != "\r\n"; {
		if line, err = r.ReadString('\n'); err != nil {
			return fmt.Errorf("read head: %w", err)
		}
	}
	return labtest.CheckPattern(counting{io.LimitReader(r, d.Want), &d.Got}, d.Want)
}

// counting counts what is read.
type counting struct {
	io.Reader
	n *int64
}

func (c counting) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	*c.n += int64(n)
	return n, err
}

// serveBody answers a request for N bytes with them, and waits for the client's
// end. What does not get through is not left behind.
func serveBody(c *net.TCPConn) error {
	_ = c.SetLinger(0)
	if err := serve(c); err != nil {
		return err
	}
	_ = c.SetLinger(-1)
	return nil
}

func serveTLS(c *net.TCPConn) error {
	cert, err := certificate()
	if err != nil {
		return err
	}
	_ = c.SetLinger(0)
	return serve(tls.Server(c, &tls.Config{Certificates: []tls.Certificate{cert}}))
}

func serve(c net.Conn) error {
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return nil // the path failed
	}
	n, err := strconv.ParseInt(strings.TrimPrefix(strings.Fields(line)[1], "/"), 10, 64)
	if err != nil {
		return err
	}
	_, _ = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", n)
	body := labtest.Pattern(n)
	for ; n > 0; n -= part {
		if _, err := io.CopyN(c, body, min(n, part)); err != nil {
			return nil
		}
		time.Sleep(partEvery)
	}
	_, _ = io.Copy(io.Discard, c)
	return nil
}

// certificate makes one, once.
var certificate = sync.OnceValues(func() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"a.example"}, NotAfter: time.Now().Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(crand.Reader, template, template, &key.PublicKey, key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
})
