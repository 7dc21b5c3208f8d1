#!/bin/bash
# One query through the proxy to a resolver of its own, without internet, and the story of it.
# usage: demo.sh PROXY UPSTREAM
set -u
if [ -t 1 ]; then  # on a terminal the numbers, times and results stand out
    "$0" "$@" | sed -uE $'s/^#[0-9]+ \\[[1-8]\\] *[0-9.]+ ms/\e[36m&\e[0m/
        s/^SUCCESS/\e[1;32m&\e[0m/; s/^FAILURE/\e[1;31m&\e[0m/; s/^TOTALS/\e[1m&\e[0m/'
    exit "${PIPESTATUS[0]}"
fi
dir=$(mktemp -d /tmp/dot-proxy-test-XXXXXX)
mkfifo "$dir/end"
"$2" <"$dir/end" >"$dir/options" & upstream=$!
exec 9>"$dir/end"  # the resolver ends when this is closed
trap 'exec 9>&-; kill $proxy 2>/dev/null; wait 2>/dev/null; rm -rf "$dir"' EXIT
for _ in $(seq 100); do [ -s "$dir/options" ] && break; sleep 0.1; done
for _ in 1 2 3 4 5; do
    port=$((20000 + (RANDOM * 32768 + RANDOM) % 12000))
    # shellcheck disable=SC2046
    "$1" -vv --listen 127.0.0.1@$port $(cat "$dir/options") 9>&- & proxy=$!
    for _ in $(seq 50); do (: </dev/tcp/127.0.0.1/$port) 2>/dev/null && break 2; kill -0 $proxy 2>/dev/null || break; sleep 0.1; done
done
# A query by hand, so that no client is needed: example.com, type A. The length of 29 octets comes first.
exec 8<>/dev/tcp/127.0.0.1/$port || exit 1
printf '\0\x1d\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x07example\x03com\0\0\x01\0\x01' >&8
answer=$(head -c 47 <&8 | od -An -v -tx1 | tr -d ' \n')
sleep 0.2  # the last line is written after the answer
kill $proxy; wait $proxy; status=$?
[ ${#answer} = 94 ] && [ "${answer:4:4}" = 1234 ] && [ $status = 0 ] || { echo "no answer: '$answer', exit $status"; exit 1; }
