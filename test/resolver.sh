#!/bin/bash
# The program in front of a resolver of others' making (unbound), asked by clients of others' making.
# usage: PROXY=... resolver.sh CASE   Each answer must be the one that the resolver gives directly.
set -u
for tool in unbound dig kdig nslookup openssl; do
    command -v $tool >/dev/null || [ -x /usr/sbin/$tool ] || { echo "skipped: no $tool"; exit 77; }
done
PATH=$PATH:/usr/sbin
dir=$(mktemp -d /tmp/dot-proxy-test-XXXXXX)
trap 'kill $(cat "$dir"/*.pid 2>/dev/null) 2>/dev/null; rm -rf "$dir"' EXIT
cd "$dir" || exit 1

ec="-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
openssl req -x509 $ec -keyout ca.key -out ca.pem -days 30 -subj "/CN=test CA" 2>/dev/null
openssl req $ec -keyout srv.key -out srv.csr -subj "/CN=x" 2>/dev/null
openssl x509 -req -in srv.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 30 -out srv.pem \
    -extfile <(echo "subjectAltName=DNS:dot.test") 2>/dev/null
long=$(printf '%0200d' 7)
start() {  # on three ports that are free, or the next ones
    base=$((20000 + (RANDOM * 32768 + RANDOM) % 12000))
    tls=$base plain=$((base + 1)) port=$((base + 2))
    cat >unbound.conf <<C
server:
  interface: 127.0.0.1@$tls
  interface: ::1@$tls
  interface: 127.0.0.1@$plain
  tls-port: $tls
  tls-service-key: "$dir/srv.key"
  tls-service-pem: "$dir/srv.pem"
  do-daemonize: no
  chroot: ""
  username: ""
  directory: "$dir"
  use-syslog: no
  pidfile: ""
  module-config: "iterator"
  minimal-responses: yes
  local-zone: "example.test." static
  local-data: "a.example.test. 60 IN A 192.0.2.1"
  local-data: "a.example.test. 60 IN AAAA 2001:db8::1"
  local-data: "m.example.test. 60 IN MX 10 a.example.test."
  local-data: "c.example.test. 60 IN CNAME a.example.test."
$(for i in $(seq 20); do echo "  local-data: 'big.example.test. 60 IN TXT \"$i $long\"'"; done)
remote-control:
  control-enable: no
C
    unbound -c unbound.conf >unbound.log 2>&1 & echo $! >unbound.pid
    "$PROXY" -l 127.0.0.1@$port -l ::1@$port -u "${UP:-127.0.0.1}@$tls#dot.test" -c ca.pem >out 2>err & echo $! >proxy.pid
    for _ in $(seq 100); do
        dig @127.0.0.1 -p $plain +short +tries=1 +time=1 a.example.test 2>/dev/null | grep -q 192.0.2.1 &&
            (: </dev/tcp/127.0.0.1/$port) 2>/dev/null && (: </dev/tcp/127.0.0.1/$tls) 2>/dev/null &&
            kill -0 $(cat proxy.pid) $(cat unbound.pid) 2>/dev/null && return 0
        kill -0 $(cat proxy.pid) $(cat unbound.pid) 2>/dev/null || break
        sleep 0.1
    done
    kill $(cat ./*.pid) 2>/dev/null; wait; return 1
}
up=1
for _ in 1 2 3 4 5; do start && { up=0; break; }; done
[ $up = 0 ] || { cat unbound.log err; exit 1; }

# What must be equal: all but the id, the times, the server, the length, and the padding and size of OPT.
plainly() { sed -E '/^;; (Query time|SERVER|WHEN|MSG SIZE)|^; <<>>|global options|^; \(|COOKIE|PAD/d; s/id: [0-9]+//; s/udp: [0-9]+//' |
    awk '/ANSWER SECTION/ {print; answers = 1; next} /^$/ {if (answers) close("sort"); answers = 0} answers {print | "sort"; next} {print}'; }
same() {  # dig options
    dig @"${to:-127.0.0.1}" -p $port +tries=2 +time=20 "$@" >proxied
    dig @127.0.0.1 -p $plain +tries=2 +time=20 "$@" >direct
    plainly <proxied >a; plainly <direct >b
    diff a b || { echo "differs: dig $*"; exit 1; }
    grep -q 'status: ' a || { echo "no answer: dig $*"; cat proxied out; exit 1; }
}
case $1 in
plain) for name in a.example.test "a.example.test AAAA" "m.example.test MX" "c.example.test" "none.example.test" "a.example.test TYPE65280"; do same $name; done ;;
tcp) same +tcp a.example.test; same +tcp m.example.test MX; same +tcp none.example.test ;;
noedns) same +noedns a.example.test; same +noedns +tcp a.example.test; ! grep -q 'OPT PSEUDO' proxied || { echo "an OPT came"; exit 1; } ;;
dnssec) same +dnssec a.example.test; same +dnssec +cdflag +adflag a.example.test; grep -q 'flags: do' proxied ;;
bufsize_512) same +bufsize=512 a.example.test; same +bufsize=512 +ignore +noall +comments +question big.example.test TXT; grep -q ' tc ' proxied || exit 1 ;;
long_answer_over_tcp) same +tcp big.example.test TXT; [ "$(grep -c 'IN.*TXT' proxied)" -ge 20 ] || exit 1 ;;
long_answer_over_udp_is_cut_and_asked_again) same big.example.test TXT; grep -q 'Truncated, retrying in TCP' proxied || { cat proxied; exit 1; }
    [ "$(grep -c 'IN.*TXT' proxied)" -ge 20 ] || exit 1 ;;
over_ipv6) to=::1; same a.example.test; same +tcp big.example.test TXT ;;
upstream_over_ipv6) same a.example.test ;;
kdig) for options in "" +tcp +padding=64 +edns=0 +dnssec "+nocookie +nsid"; do
        kdig @127.0.0.1 -p $port +timeout=20 $options a.example.test >proxied
        grep -q 'status: NOERROR' proxied && grep -q 192.0.2.1 proxied && ! grep -qi padding proxied || { echo "kdig $options"; cat proxied; exit 1; }
    done ;;
nslookup) nslookup -port=$port -timeout=20 a.example.test 127.0.0.1 >proxied; grep -q 192.0.2.1 proxied && grep -q 2001:db8::1 proxied || { cat proxied; exit 1; }
    nslookup -port=$port -timeout=20 none.example.test 127.0.0.1 | grep -q NXDOMAIN ;;
line) same a.example.test; same a.example.test; sleep 0.3; grep -qE '^SUCCESS udp A NOERROR [0-9]+ octets [0-9]+\.[0-9] ms dot\.test TLSv1\.3 (full|resumed) (dialled|ready)$' out || { cat out; exit 1; } ;;
*) echo "no such case"; exit 1 ;;
esac || { cat proxied out err; exit 1; }
proxy=$(cat proxy.pid)
kill -TERM "$proxy"; wait "$proxy"; status=$?
[ $status = 0 ] && [ ! -s err ] || { echo "the proxy ended with $status"; cat err; exit 1; }
