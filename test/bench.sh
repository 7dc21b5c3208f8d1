#!/bin/bash
# dot-proxy beside the forwarders that are installed (unbound, stubby, dnsdist, kresd), one table: the
# same upstream, the same load, one run. usage: bench.sh PROXY UPSTREAM. Needs dnsperf. About a minute.
# All on loopback, so it shows what the programs cost and not what round trips cost.
set -u
export PATH=$PATH:/usr/sbin
command -v dnsperf >/dev/null || { echo "needs dnsperf: apt-get install dnsperf"; exit 1; }
proxy=$1 dir=$(mktemp -d /tmp/dot-proxy-test-XXXXXX)
mkfifo "$dir/end"
"$2" <"$dir/end" >"$dir/options" & exec 9>"$dir/end"
trap 'exec 9>&-; for p in "${pids[@]:-}"; do kill $p 2>/dev/null; done; wait 2>/dev/null; rm -rf "$dir"' EXIT
for _ in $(seq 100); do [ -s "$dir/options" ] && break; sleep 0.1; done
read -r _ spec _ ca <"$dir/options"
address=${spec%%@*} rest=${spec#*@} up=${rest%%#*}
cd "$dir" || exit 1
seq -f 'n%.0f.test A' 200000 >names
pids=() port=$((20000 + RANDOM % 10000))

start() {  # name, command...: runs it, waits until it answers; false: it does not
    name=$1; shift
    "$@" >"$name.log" 2>&1 9>&- & pid=$!; pids+=($pid)
    for _ in $(seq 80); do
        printf 'ready.test A\n' | dnsperf -s 127.0.0.1 -p $port -n 1 -t 1 2>/dev/null | grep -q 'completed: *1' && return 0
        kill -0 $pid 2>/dev/null || return 1
        sleep 0.1
    done
    return 1
}
measure() {
    one=$(dnsperf -s 127.0.0.1 -p $port -d names -l 3 -c 1 -q 1 2>/dev/null | awk '/Average Latency/{printf "%.2f", $4 * 1000}')
    all=$(dnsperf -s 127.0.0.1 -p $port -d names -l 4 -c 10 -q 100 2>/dev/null | awk '/per second/{q=$4} /lost:/{l=$3} END{printf "%8.0f %6d", q, l}')
    printf '%-18s %9s %s %8s\n' "$name" "$one" "$all" "$(awk '/VmHWM/{printf "%.1f", $2 / 1024}' /proc/$pid/status)"
    kill $pid; wait $pid 2>/dev/null; return 0
}
try() { port=$((port + 1)); "$@" && measure || echo "$name: does not start here"; }

printf '%-18s %9s %8s %6s %8s\n' program "one, ms" "queries/s" lost "peak MB"
try start dot-proxy "$proxy" -q -l 127.0.0.1@$((port + 1)) -u "$spec" -c "$ca"
try start "dot-proxy --reuse" "$proxy" -q -R -l 127.0.0.1@$((port + 1)) -u "$spec" -c "$ca"
port=$((port + 1))
if command -v unbound >/dev/null; then
    printf 'server:\n interface: 127.0.0.1@%s\n do-not-query-localhost: no\n do-daemonize: no\n chroot: ""\n username: ""\n use-syslog: no\n pidfile: ""\n directory: "%s"\n tls-cert-bundle: %s\n local-zone: "test." nodefault\n module-config: "iterator"\n outgoing-num-tcp: 200\nforward-zone:\n name: "."\n forward-tls-upstream: yes\n forward-addr: %s@%s#dot.test\nremote-control:\n control-enable: no\n' $((port + 1)) "$dir" "$ca" "$address" "$up" >unbound.conf
    try start unbound unbound -c unbound.conf
fi
if command -v stubby >/dev/null; then
    printf 'resolution_type: GETDNS_RESOLUTION_STUB\ndns_transport_list:\n  - GETDNS_TRANSPORT_TLS\ntls_authentication: GETDNS_AUTHENTICATION_REQUIRED\nidle_timeout: 10000\ntls_ca_file: "%s"\nlisten_addresses:\n  - 127.0.0.1@%s\nupstream_recursive_servers:\n  - address_data: %s\n    tls_port: %s\n    tls_auth_name: "dot.test"\n' "$ca" $((port + 1)) "$address" "$up" >stubby.yml
    try start stubby stubby -l -C stubby.yml
fi
if command -v dnsdist >/dev/null; then
    printf 'setLocal("127.0.0.1:%s")\nsetSecurityPollSuffix("")\nnewServer({address="%s:%s", tls="openssl", subjectName="dot.test", caStore="%s", validateCertificates=true}):setUp()\n' $((port + 1)) "$address" "$up" "$ca" >dnsdist.conf
    try start dnsdist dnsdist --supervised --disable-syslog -C dnsdist.conf
fi
if command -v kresd >/dev/null; then
    mkdir kr; printf "net.listen('127.0.0.1', %s, { kind = 'dns' })\ntrust_anchors.remove('.')\ncache.size = 10*MB\npolicy.add(policy.all(policy.TLS_FORWARD({{'%s@%s', hostname='dot.test', ca_file='%s'}})))\n" $((port + 1)) "$address" "$up" "$ca" >kresd.conf
    try start kresd kresd -n -c "$dir/kresd.conf" "$dir/kr"
fi
