#!/usr/bin/env bash
# Proves the exercises: each NN-name.patch applies as it is, compiles with every warning an error, fails
# exactly the tests that answers/NN-name.md names after "caught-by:", and passes all others.
# usage: prove.sh [-R REGEX] [DIR [NN...]]     DIR: of the exercises; REGEX: only these tests (for the controls)
# Prints a table; exits with 1 if anything is not proven. Without NN it ends with negative controls.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
top=$(cd "$here/../.." && pwd)
regex=.
[ "${1:-}" = -R ] && { regex=$2; shift 2; }
dir=$(cd "${1:-$here}" && pwd) || exit 1
shift $(($# > 0))
others='^(soak|outage|flood|readme|demo|house|watch)\.'  # they take long, or look at other files than the program
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# The program and its tests, once; for each exercise only what it changes is built again.
prepare() {
    cp -r "$top/Makefile" "$top/test" "$scratch" && restore && build && cd "$scratch/build/test" &&
        ctest -N -R "$regex" -E "$others" | sed -n 's/^ *Test *#[0-9]*: //p' >"$scratch/known" &&
        [ -s "$scratch/known" ]
}

restore() { cp -p "$top/main.cpp" "$top/dot.cpp" "$top/dot.hpp" "$scratch" && touch "$scratch"/*.?pp; }

build() {  # what it prints tells why it does not compile
    make -C "$scratch" CXXFLAGS="-O1 -Wall -Wextra -Werror" build/dot-proxy build/test/all >"$scratch/log" 2>&1
}

# The tests that fail, one a line: those that also fail three times more when little else runs.
failing() {
    local list="$scratch/build/test/Testing/Temporary/LastTestsFailed.log"
    cd "$scratch/build/test" || exit 1
    rm -f "$list"
    timeout 600 ctest -j $((3 * $(nproc))) --timeout 60 -R "$regex" -E "$others" >"$scratch/log" 2>&1
    if [ -s "$list" ]; then
        timeout 1200 ctest --rerun-failed -j 2 --timeout 60 --repeat until-pass:3 >"$scratch/log" 2>&1 &&
            rm -f "$list"
    fi
    [ ! -s "$list" ] || cut -d: -f2 "$list" | sort
}

# Why the exercise is not proven; nothing: it is.
verdict() {  # NAME
    local answer="$dir/answers/$1.md" named unknown found
    [ -f "$answer" ] || { echo "has no answer"; return; }
    head -1 "$answer" | grep -q '^caught-by:' || { echo "its answer does not begin with caught-by:"; return; }
    grep -q '^level: [123]$' "$answer" || { echo "its answer has no level"; return; }
    named=$(sed -n '1s/^caught-by: *//p' "$answer" | tr -s ' ' '\n' | sed '/^$/d' | sort)
    unknown=$(comm -23 <(echo "$named") <(sort "$scratch/known") | xargs)
    [ -z "$unknown" ] || { echo "names unknown tests: $unknown"; return; }
    restore
    patch -d "$scratch" -p1 --fuzz=0 --batch <"$dir/$1.patch" >/dev/null || { echo "does not apply"; return; }
    touch "$scratch"/*.?pp
    build || { echo "does not compile: $(grep -m1 error "$scratch/log")"; return; }
    found=$(failing)
    [ "$found" = "$named" ] || echo "named but passed: $(comm -23 <(echo "$named") <(echo "$found") | xargs);" \
        "failed but not named: $(comm -13 <(echo "$named") <(echo "$found") | xargs)"
}

refused() {  # WHAT: the only exercise in $dir must not be proven
    local why
    why=$(verdict 01-control)
    [ -n "$why" ] && printf 'control: %s is refused: %s\n' "$1" "$why" && return
    echo "CONTROL FAILED: $1 is taken for proven"
    exit 1
}

# An answer that names the wrong test, a defect said to be sound, and a patch that does not apply any more.
controls() {
    local real=$dir/04-pad-in-one-pass
    dir=$scratch/control
    regex='^(pad|judge)\.'
    mkdir -p "$dir/answers"
    cp "$real.patch" "$dir/01-control.patch"
    printf 'caught-by: judge.verdicts\nlevel: 1\n' >"$dir/answers/01-control.md"
    refused "an answer that names the wrong test"
    printf 'caught-by:\nlevel: 1\n' >"$dir/answers/01-control.md"
    refused "a defect that is said to be sound"
    sed -i 's/^-    const Bytes bare/-    const Bytes naked/' "$dir/01-control.patch"
    refused "a patch that does not apply"
}

prepare || { cat "$scratch/log"; exit 1; }
mapfile -t names < <(cd "$dir" && ls -- *.patch answers/*.md 2>/dev/null | sed 's,.*/,,; s/\.[a-z]*$//' | sort -u)
[ ${#names[@]} -gt 0 ] || { echo "no exercises in $dir"; exit 1; }
bad=0 results=()
row() { printf '%-32s %-6s %-11s %s\n' "$@"; }
if [ $# -eq 0 ]; then
    before=$(failing | xargs)
    [ -z "$before" ] || { echo "without any patch these fail: $before"; exit 1; }
fi
for name in "${names[@]}"; do
    [ $# -eq 0 ] || [[ " $* " == *" ${name%%-*} "* ]] || continue
    [ -f "$dir/$name.patch" ] && why=$(verdict "$name") || why="has no patch"
    caught=$(sed -n '1s/^caught-by: *//p' "$dir/answers/$name.md" 2>/dev/null)
    level=$(sed -n 's/^level: //p' "$dir/answers/$name.md" 2>/dev/null)
    [ -z "$why" ] || bad=1
    state=$([ -z "$why" ] && echo proven || echo "NOT proven")
    results+=("$(row "$name" "$level" "$state" "${why:-${caught:-none, it is sound}}")")
    echo "${results[-1]}" >&2
done
echo
row exercise level "" "tests that catch it"
printf '%s\n' "${results[@]}"
[ $# -gt 0 ] || controls
exit $bad
