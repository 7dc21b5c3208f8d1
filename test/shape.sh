#!/bin/bash
# The shape of the program: every socket blocks, and a query's way is one function to be read from top to bottom. Then
# that this check can fail: it must find each of the faults below in a copy that has it. usage: shape.sh SOURCES
set -u
words='O_NONBLOCK|SOCK_NONBLOCK|FIONBIO|BIO_set_nbio|BIO_socket_nbio|p?poll|p?select|epoll\w*'

# A function's text, if the file defines it just once. usage: body FILE NAME
body() {
    awk -v start="^(static )?void $2\\\\(.*[^;]\$" '$0 ~ start {n++; inside = 1} inside {print} /^}/ {inside = 0}
        END {exit n != 1}' "$1"
}

check() {
    local bad=0 steps
    for file in main.cpp dot.hpp dot.cpp; do
        [ -s "$1/$file" ] || { echo "there is no $file"; bad=1; }
        sed 's|//.*||' "$1/$file" | grep -nwE --label="$file" -H "$words" && bad=1
    done
    for place in main.cpp/serve_udp main.cpp/serve_client dot.cpp/carry; do
        body "$1/${place%/*}" "${place#*/}" >/dev/null || { echo "${place%/*} does not define ${place#*/}() once"; bad=1; }
    done
    steps=$(body "$1/dot.cpp" carry | grep -oE '^ *// \[[1-8]\]' | tr -d ' /[]\n')
    [ "$steps" = 345678 ] || { echo "carry() has the steps '$steps', not 345678"; bad=1; }
    return $bad
}

check "$1" || exit 1

# usage: fails FILE SED-COMMAND
copy=$(mktemp -d /tmp/dot-proxy-test-XXXXXX)
trap 'rm -rf "$copy"' EXIT
fails() {
    cp "$here"/{main.cpp,dot.hpp,dot.cpp} "$copy" && sed -i -E "$2" "$copy/$1"
    cmp -s "$copy/$1" "$here/$1" && { echo "$2 changes nothing in $1"; exit 1; }
    check "$copy" >/dev/null && { echo "nobody finds: $1 after $2"; exit 1; }
    return 0
}
here=$1
fails main.cpp 's/SOCK_CLOEXEC/SOCK_CLOEXEC | SOCK_NONBLOCK/'
fails dot.cpp '0,/^#include/s//#include <poll.h>\n&/'
fails dot.cpp '$s/$/\nint wait_for_all(int fd) { return epoll_wait(fd, nullptr, 0, 0); }/'
fails dot.hpp 's/^\};/    int select(int);\n&/'
fails main.cpp 's/\bserve_udp\b/serve_all/'
fails main.cpp 's/\bserve_client\b/serve_all/'
fails dot.cpp 's/\bcarry\b/bring/'
fails dot.cpp 's|// \[6\] |// |'
fails dot.cpp '/^ +\/\/ \[5\]/{s/5/4/;b};/^ +\/\/ \[4\]/s/4/5/'
fails dot.cpp 's|^( +)// \[5\]|}\nstatic void send(Connection\& connection) {\n&|'
