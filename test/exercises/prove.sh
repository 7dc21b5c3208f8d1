#!/usr/bin/env bash
# Proves the exercises: each NN-name.patch has a message like the others, applies as it is, compiles with every warning
# an error, stays formatted, and fails exactly the tests that answers/NN-name.md names after "caught-by:".
# usage: prove.sh [--all] [NN...]
# Of the tests that must pass it runs those that "seen-by:" matches. --all runs every one of them, one exercise after the
# other: do so once for an exercise that is new, and when little else runs, for some tests measure time. Prints a table;
# exits with 1 if anything is not proven. Without NN it ends with controls.
set -uo pipefail
cd "$(dirname "$0")"
dir=$PWD
top=$(cd ../.. && pwd)
all= at_once=$(nproc)
[ "${1:-}" = --all ] && { all=. at_once=1; shift; }
# They take long or all that the machine gives, look at other files than the program's, or may not be there.
others='^(soak|outage|flood|chaos|readme|demo|house|posix|annotate|watch|steps)\.'
for tool in patch cmake; do
    command -v "$tool" >/dev/null || { echo "needs $tool: apt-get install $tool" >&2; exit 1; }
done
unset MAKEFLAGS MFLAGS MAKEOVERRIDES MAKELEVEL  # This may run below a make of another kind.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# The objects of the program and of the unit tests. One that comes from the same sources as in the plain tree, which is
# built first, is taken from there.
build() {  # TREE
    local one source flags=(-std=c++20 -pthread -O1 -Wall -Wextra -Werror "-I$1" "-I$top/test")
    for one in main dot unit; do
        source=$1/$one.cpp
        [ $one = unit ] && source=$top/test/unit.cpp && flags+=(-Wno-missing-field-initializers)
        if [ -e "$scratch/plain/$one.o" ] && cmp -s "$1/dot.hpp" "$top/dot.hpp" &&
            { [ $one = unit ] || cmp -s "$source" "$top/$one.cpp"; }; then
            ln -f "$scratch/plain/$one.o" "$1" || return
        else
            "${CXX:-g++}" "${flags[@]}" -c -o "$1/$one.o" "$source" || return
        fi
    done
    "${CXX:-g++}" -pthread -o "$1/dot-proxy" "$1/main.o" "$1/dot.o" -lssl -lcrypto &&
        "${CXX:-g++}" -pthread -o "$1/unit" "$1/unit.o" "$1/dot.o" "$top/build/test/libserver.a" -lssl -lcrypto &&
        sed "s,$top/build/dot-proxy,$1/dot-proxy,g; s,$top/build/test/unit,$1/unit,g; s/TIMEOUT \"300/TIMEOUT \"120/" \
            "$top/build/test/CTestTestfile.cmake" >"$1/CTestTestfile.cmake"
}

plain_tree() {  # TREE
    mkdir -p "$1" && cp "$top/main.cpp" "$top/dot.cpp" "$top/dot.hpp" "$top/.clang-format" "$1"
}

names_of_tests() {  # TREE REGEX
    (cd "$1" && ctest -N -R "$2" -E "$others") | sed -n 's/^ *Test *#[0-9]*: //p' | sort
}

# The tests that fail three times, one a line.
failing() {  # TREE REGEX
    local list=Testing/Temporary/LastTestsFailed.log
    cd "$1" || exit 1
    ctest -j 4 -R "$2" -E "$others" >log 2>&1
    if [ -s $list ]; then
        ctest --rerun-failed -j 2 --repeat until-pass:2 >log 2>&1 && rm -f $list
    fi
    [ ! -s $list ] || cut -d: -f2 $list | sort
}

# What is wrong with the message before the diff; nothing: it is like the others.
fault_of_message() {  # PATCH
    local head
    head=$(sed -n '1,3s/: .*//p' "$1" | xargs)
    [ "$head" = "From Date Subject" ] || echo "does not begin with From, Date and Subject"
    sed '/^---$/q' "$1" | grep -q '.\{73\}' && echo "has a message of more than 72 columns"
    grep -qx -e --- "$1" || echo "has no --- before the diff"
}

# Why the exercise is not proven; nothing: it is.
verdict() {  # NAME
    local patch=$dir/$1.patch answer=$dir/answers/$1.md tree=$scratch/$1 named seen regex unknown found
    [ -f "$patch" ] || { echo "has no patch"; return; }
    [ -f "$answer" ] || { echo "has no answer"; return; }
    sed -n 1p "$answer" | grep -q '^caught-by:' || { echo "its answer does not begin with caught-by:"; return; }
    sed -n 2p "$answer" | grep -q '^level: [123]$' || { echo "its answer has no level"; return; }
    named=$(sed -n '1s/^caught-by: *//p' "$answer" | tr -s ' ' '\n' | sort)
    seen=$(sed -n '3s/^seen-by: *//p' "$answer")
    [ -n "$seen" ] && [ -n "$(names_of_tests "$scratch/plain" "$seen")" ] || { echo "is seen by no test"; return; }
    unknown=$(comm -23 <(echo "$named") <(names_of_tests "$scratch/plain" .) | xargs)
    [ -z "$unknown" ] || { echo "names unknown tests: $unknown"; return; }
    fault_of_message "$patch" | grep -m1 . && return
    plain_tree "$tree"
    patch -d "$tree" -p1 --fuzz=0 --batch --no-backup-if-mismatch <"$patch" >/dev/null ||
        { echo "does not apply"; return; }
    build "$tree" >"$tree/log" 2>&1 || { echo "does not compile: $(grep -m1 error "$tree/log")"; return; }
    if command -v clang-format >/dev/null; then
        (cd "$tree" && clang-format --dry-run -Werror main.cpp dot.cpp dot.hpp) 2>/dev/null ||
            { echo "is not formatted"; return; }
    fi
    regex=${all:-"$seen|^($(echo "$named" | sed 's/\./\\./g' | paste -sd'|'))$"}
    found=$(failing "$tree" "$regex")
    [ "$found" = "$named" ] || echo "named but passed: $(comm -23 <(echo "$named") <(echo "$found") | xargs);" \
        "failed but not named: $(comm -13 <(echo "$named") <(echo "$found") | xargs)"
}

row() { printf '%-32s %-6s %-11s %s\n' "$@"; }

prove() {  # NAME: leaves a row of the table
    local answer=$dir/answers/$1.md why caught level state=proven
    why=$(verdict "$1")
    [ -z "$why" ] || state="NOT proven"
    caught=$(sed -n '1s/^caught-by: *//p' "$answer" 2>/dev/null)
    level=$(sed -n '2s/^level: //p' "$answer" 2>/dev/null)
    row "$1" "$level" "$state" "${why:-${caught:-none, it is sound}}" | tee "$scratch/$1.row" >&2
    rm -rf "${scratch:?}/$1"
}

refused() {  # WHAT CAUGHT-BY WHY: the only exercise in $dir must not be proven, for this reason
    local why
    printf 'caught-by: %s\nlevel: 1\nseen-by: ^(pad|frame)\\.\n' "$2" >"$dir/answers/control.md"
    why=$(verdict control)
    rm -rf "$scratch/control"
    [[ "$why" == $3 ]] && printf 'control: %s is refused: %s\n' "$1" "$why" && return
    echo "CONTROL FAILED: $1 is not refused: $why"
    exit 1
}

# An answer that names the wrong test, a defect said to be sound, and a patch that applies no more. The defect is made
# here, so that it gives no exercise away.
controls() {
    dir=$scratch/controls all=
    mkdir -p "$dir/answers" "$scratch/controls/b"
    sed 's/(128 - size % 128) % 128/(128 - size % 128) % 64/' "$top/dot.cpp" >"$dir/b/dot.cpp"
    {
        printf 'From: A\nDate: B\nSubject: C\n---\n'
        diff -u --label a/dot.cpp --label b/dot.cpp "$top/dot.cpp" "$dir/b/dot.cpp"
    } >"$dir/control.patch"
    local named="pad.every_size_to_a_multiple_of_128 pad.own_padding_is_replaced"
    refused "an answer that names the wrong test" "$named frame.length_first" "named but passed: frame.length_first; *"
    refused "a defect that is said to be sound" "" "named but passed: ; failed but not named: *$named*"
    sed -i 's/^-    const size_t padding/-    const size_t stuffing/' "$dir/control.patch"
    refused "a patch that does not apply" "$named" "does not apply"
}

echo "the program and its tests are built ..." >&2
make -C "$top" build/test/all >"$scratch/log" 2>&1 && plain_tree "$scratch/plain" && build "$scratch/plain" ||
    { cat "$scratch/log"; exit 1; }
mapfile -t names < <(ls -- *.patch answers/*.md 2>/dev/null | sed 's,.*/,,; s/\.[a-z]*$//' | sort -u)
[ ${#names[@]} -gt 0 ] || { echo "there are no exercises"; exit 1; }
if [ -n "$all" ]; then
    before=$(failing "$scratch/plain" . | xargs)
    [ -z "$before" ] || { echo "without any patch these fail: $before"; exit 1; }
fi
for name in "${names[@]}"; do
    [ $# -eq 0 ] || [[ " $* " == *" ${name%%-*} "* ]] || continue
    while [ "$(jobs -rp | wc -l)" -ge "$at_once" ]; do wait -n; done
    prove "$name" &
done
wait
# Some tests measure time, so what was not proven beside another one gets a second chance alone.
for row in $(grep -l 'NOT proven' "$scratch"/*.row); do
    name=$(basename "$row" .row)
    echo "again, alone: $name" >&2
    prove "$name"
done
echo
row exercise level "" "tests that catch it"
cat "$scratch"/*.row || { echo "there is no exercise of that number"; exit 1; }
[ $# -gt 0 ] || controls
! grep -q 'NOT proven' "$scratch"/*.row
