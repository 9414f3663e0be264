package cli

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"

	"waybill.dev/schemas"
)

// connectToken is the environment variable that may hold an agent's token.
const connectToken = "WAYBILL_TOKEN"

// connect is `waybill connect`: a server for clients that start their servers
// themselves and speak to them by stdin and stdout. It is the running gateway's
// client, for one of its servers or views or for all of them.
//
// What is what: connect_relay.go takes the client's messages and keeps count of
// what is under way, connect_call.go carries one request to the gateway and
// brings back what comes of it, connect_session.go keeps the session of clients
// before 2026-07-28, connect_post.go is HTTP.
func connect(ctx context.Context, env Env, args []string) error {
	fs := flag.NewFlagSet("connect", flag.ContinueOnError)
	server := fs.String("server", "", "`NAME` of a server or view (default: all servers, as at /mcp)")
	addr := fs.String("url", "", "`URL` of the running gateway (default: http://127.0.0.1:8080)")
	file := fs.String("config", "", "configuration `FILE` of the running gateway, for its address instead of --url")
	tokenFile := fs.String("token-file", "", "`FILE` with the agent's token (default: $"+connectToken+", or no token)")
	if err := none(parse(env, fs, args)); err != nil {
		return err
	}
	if *server != "" {
		if err := schemas.CheckToken(*server); err != nil {
			return usagef("--server %q: %v", *server, err)
		}
	}
	base, err := connectURL(*addr, *file)
	if err != nil {
		return err
	}
	token, err := agentToken(env, *tokenFile)
	if err != nil {
		return err
	}
	if env.Stdin == nil {
		return errors.New("there is no stdin to read from")
	}
	endpoint := base.JoinPath("mcp", *server)

	// A client that is gone is told by the write that fails, not by the signal
	// that would end the process with its session open.
	pipe := make(chan os.Signal, 1)
	signal.Notify(pipe, syscall.SIGPIPE)
	defer signal.Stop(pipe)

	var mu sync.Mutex
	say := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		_, _ = fmt.Fprintf(env.Stderr, "waybill connect: %s\n", visible(fmt.Sprintf(format, args...)))
	}
	if token != "" && base.Scheme == "http" && !loopback(base.Hostname()) {
		say("the token goes to %s unencrypted: use https beyond this machine", base.Host)
	}
	transport := newConnectTransport()
	defer transport.CloseIdleConnections()
	r := newRelay(endpoint, token, transport, env.Stdout, say, relayTimes{})
	return r.run(ctx, env.Stdin)
}

// connectURL is the gateway's address.
func connectURL(addr, file string) (*url.URL, error) {
	switch {
	case addr != "" && file != "":
		return nil, usagef("--url and --config exclude each other")
	case file != "":
		c, err := loadConfig(file)
		if err != nil {
			return nil, err
		}
		u, err := listenURL(c.Listen)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		return u, nil
	case addr == "":
		addr = "http://" + defaults().Listen
	}
	u, err := url.Parse(addr)
	switch {
	case err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https":
		return nil, usagef("--url: not a URL such as http://127.0.0.1:8080")
	case u.User != nil || u.RawQuery != "" || u.Fragment != "":
		return nil, usagef("--url: only scheme, host, port and path; a token is given by --token-file or $%s", connectToken)
	case strings.HasSuffix(strings.TrimSuffix(u.Path, "/"), "/mcp") || strings.Contains(u.Path, "/mcp/"):
		return nil, usagef("--url: the gateway's address, without /mcp; --server names the server")
	}
	return u, nil
}

// listenURL is where clients on this machine find a gateway that listens there.
func listenURL(listen string) (*url.URL, error) {
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1" // every address of this machine is one of them
	}
	return &url.URL{Scheme: "http", Host: net.JoinHostPort(host, port)}, nil
}

// agentToken is the token that the caller is known by; "" for none.
func agentToken(env Env, file string) (string, error) {
	token, from := env.Getenv(connectToken), "$"+connectToken
	if file != "" {
		b, err := os.ReadFile(file)
		if err != nil {
			return "", fmt.Errorf("token: %w", err)
		}
		if token, from = strings.TrimSpace(string(b)), file; token == "" {
			return "", fmt.Errorf("token: %s is empty", file)
		}
	}
	if strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", fmt.Errorf("token: what %s has is no token: there are characters in it that cannot be", from)
	}
	return token, nil
}

// newConnectTransport makes connections of which it soon shows that they are
// dead, as they are after a laptop has slept or changed its network.
//
// They are HTTP/1.1 only. What a peer resets with PROTOCOL_ERROR net/http sends
// again by itself over HTTP/2, though it may have been carried out. Over HTTP/1.1
// it sends a POST again only when nothing of it was written to a connection that
// had been used before.
func newConnectTransport() *http.Transport {
	var http1 http.Protocols
	http1.SetHTTP1(true)
	dialer := &net.Dialer{Timeout: connectDial, KeepAliveConfig: net.KeepAliveConfig{
		Enable: true, Idle: connectKeepAlive, Interval: connectKeepAlive / 3, Count: 4,
	}}
	return &http.Transport{
		Proxy: http.ProxyFromEnvironment, DialContext: dialer.DialContext, TLSHandshakeTimeout: connectDial,
		MaxIdleConnsPerHost: 16, IdleConnTimeout: connectIdle, ResponseHeaderTimeout: connectHeader,
		DisableCompression: true, Protocols: &http1,
	}
}
