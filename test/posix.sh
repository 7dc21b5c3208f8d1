#!/bin/bash
# The program that is made without what POSIX lacks: it serves, and it asks nothing else of the system.
# usage: posix.sh TESTS SANITIZE, where TESTS is the directory of the tests' programs
set -eu
cd "$(dirname "$0")/.."
tests=$1
# This may run below a make of another kind, whose variables would reach this one.
unset MAKEFLAGS MFLAGS MAKEOVERRIDES MAKELEVEL
make CPPFLAGS=-DPOSIX_ONLY SANITIZE="$2" >"$tests/posix.log" 2>&1 || { cat "$tests/posix.log"; exit 1; }
PROXY=$PWD/build${2:+/${2//,/-}}/posix/dot-proxy
export PROXY

beyond='setgroups|prctl|mallopt|getopt_long'
asked=$(nm --dynamic --undefined-only "$PROXY" | awk '{sub(/@.*/, "", $2); print $2}')
usual=$(nm --dynamic --undefined-only "${PROXY%/posix/*}/dot-proxy" | awk '{sub(/@.*/, "", $2); print $2}')
if grep -xE "$beyond" <<<"$asked"; then echo "is beyond POSIX"; exit 1; fi
[ "$(grep -cxE "$beyond" <<<"$usual")" = 4 ] || { echo "the usual program has not all of $beyond"; exit 1; }

"$tests/transport" transport.udp_and_tcp_over_ipv4_and_ipv6_are_answered_alike transport.tcp_needs_no_udp_before_it
"$tests/tls" tls.name_must_be_in_san
"$tests/process" process.sigterm_finishes_queries_in_flight
