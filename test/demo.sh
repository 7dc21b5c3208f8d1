#!/bin/bash
# Two queries through the proxy to a resolver of its own, without internet, and the story of each.
# usage: demo.sh PROXY UPSTREAM [CAPTURE]   CAPTURE is a file for Wireshark: all that was sent, and what decrypts it.
set -u
if [ -t 1 ]; then  # on a terminal the numbers, times and results stand out
    "$0" "$@" | sed -uE $'s/^#[0-9]+ \\[[1-8]\\] *[0-9.]+ ms/\e[36m&\e[0m/
        s/^SUCCESS/\e[1;32m&\e[0m/; s/^FAILURE/\e[1;31m&\e[0m/; s/^TOTALS/\e[1m&\e[0m/'
    exit "${PIPESTATUS[0]}"
fi
capture=${3-} why='' own_network=${OWN_NETWORK-}
if [ -n "$capture" ] && [ -z "$own_network" ]; then
    rm -f "$capture"
    missing=
    for tool in unshare ip dumpcap editcap; do command -v $tool >/dev/null || missing+=" $tool"; done
    # In a network of its own the ports are free by which Wireshark knows DNS and TLS, and nobody else talks there.
    for way in "unshare -n" "unshare -rn"; do
        [ -z "$missing" ] && $way ip link set lo up 2>/dev/null || continue
        OWN_NETWORK=yes exec $way sh -c 'ip link set lo up; exec "$@"' sh "$0" "$@"
    done
    why="it needs the right to make a network namespace, which root has"
    [ -z "$missing" ] || why="no$missing here: apt-get install tshark iproute2"
    capture=
fi

dir=$(mktemp -d /tmp/dot-proxy-test-XXXXXX)
mkfifo "$dir/end"
"$2" ${own_network:+853 127.0.0.2} <"$dir/end" >"$dir/options" & upstream=$!
exec 9>"$dir/end"  # the resolver ends when this is closed
proxy='' dumpcap=''
trap 'exec 9>&-; kill $proxy $dumpcap 2>/dev/null; wait 2>/dev/null; rm -rf "$dir"' EXIT
for _ in $(seq 100); do [ -s "$dir/options" ] && break; sleep 0.1; done
for _ in 1 2 3 4 5; do
    port=$((20000 + (RANDOM * 32768 + RANDOM) % 12000))
    [ -z "$own_network" ] || port=53
    # shellcheck disable=SC2046
    "$1" -vv --listen 127.0.0.1@$port $(cat "$dir/options") ${capture:+--keylog "$dir/keys"} 9>&- & proxy=$!
    for _ in $(seq 50); do (: </dev/tcp/127.0.0.1/$port) 2>/dev/null && break 2; kill -0 $proxy 2>/dev/null || break; sleep 0.1; done
done
if [ -n "$capture" ]; then
    : >"$dir/dumpcap"
    dumpcap -q -P -i lo -f "port 53 or port 853" -w "$dir/pcap" 2>"$dir/dumpcap" 9>&- & dumpcap=$!
    for _ in $(seq 100); do grep -q '^File: ' "$dir/dumpcap" && break; kill -0 $dumpcap 2>/dev/null || break; sleep 0.1; done
    grep -q '^File: ' "$dir/dumpcap" || { why=$(tail -n 1 "$dir/dumpcap"); capture=''; }
fi

# The queries are made by hand, so that no client is needed: type A of two names, the first over UDP. Over TCP the
# length comes first, 43 octets.
hex() { od -An -v -tx1 | tr -d ' \n'; }
exec 8<>/dev/udp/127.0.0.1/$port || exit 1
printf '\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x07example\x03com\0\0\x01\0\x01' >&8
first=$(timeout 10 head -c 45 <&8 | hex)
sleep 0.3  # the next connection is made ready
exec 8<>/dev/tcp/127.0.0.1/$port || exit 1
printf '\0\x2b\x56\x78\x01\0\0\x01\0\0\0\0\0\0\x0da-longer-name\x07example\x03com\0\0\x01\0\x01' >&8
second=$(timeout 10 head -c 61 <&8 | hex)
sleep 0.3  # the last line is written after the answer
if [ -n "$capture" ]; then  # its packets arrive late, but in order, and the second answer is one of the last
    for _ in $(seq 100); do LC_ALL=C grep -qaP '\x56\x78[\x80-\xff]' "$dir/pcap" && break; sleep 0.1; done
    kill $dumpcap; wait $dumpcap
    dumpcap=''
fi
kill $proxy; wait $proxy; status=$?
proxy=''
[ ${#first} = 90 ] && [ "${first:0:4}" = 1234 ] && [ ${#second} = 122 ] && [ "${second:4:4}" = 5678 ] && [ $status = 0 ] ||
    { echo "no answer: '$first', '$second', exit $status"; exit 1; }
if [ -n "$capture" ] && editcap -F pcapng --inject-secrets tls,"$dir/keys" "$dir/pcap" "$capture"; then
    echo "All of it, to be watched: wireshark $capture"
elif [ $# = 3 ]; then
    echo "No capture: ${why:-editcap cannot write $3}"
fi
