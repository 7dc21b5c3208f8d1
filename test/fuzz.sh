#!/bin/bash
# Builds fuzz.cpp once for each target and runs it. usage: fuzz.sh SECONDS DIRECTORY, which has the
# seeds; there the corpus grows from run to run. What is found stays there too. Fails on any finding.
set -u
for_each=$1 dir=$2 here=$(dirname "$0") failed=0
flags="-std=c++20 -O1 -g -pthread -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all"
echo 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }' |
    clang++ $flags -fsanitize=fuzzer -x c++ - -o "$dir/probe" 2>/dev/null ||
    { echo "needs clang++ with libFuzzer: apt-get install clang libclang-rt-dev" >&2; exit 1; }
# libFuzzer looks for new paths in the program, not in its judge.
clang++ $flags -fsanitize=fuzzer-no-link -c "$here/../dot.cpp" -o "$dir/dot.o" || exit 1
for target in query answer options; do
    clang++ $flags -DTARGET=$target -I"$here/.." -c "$here/fuzz.cpp" -o "$dir/$target.o" &&
        clang++ $flags -fsanitize=fuzzer "$dir/$target.o" "$dir/dot.o" -lssl -lcrypto -o "$dir/fuzz-$target" || exit 1
done
for target in query answer options; do
    mkdir -p "$dir/corpus/$target"
    # Most findings are in short messages, and those run fastest; a few bounds need long ones.
    "$dir/fuzz-$target" -max_total_time="$for_each" -timeout=10 -print_final_stats=1 -max_len=2000 \
        -artifact_prefix="$dir/finding-$target-" "$dir/corpus/$target" "$dir/seeds/$target" \
        >"$dir/$target.log" 2>&1 || { failed=1; tail -n 40 "$dir/$target.log"; }
    awk -v target=$target '/number_of_executed_units/ {n = $2} / cov: / {for (i = 1; i < NF; i++)
        {if ($i == "cov:") c = $(i + 1); if ($i == "corp:") k = $(i + 1)}} /counters\)/ {
        sub(/.*modules *\(/, ""); sub(/ .*/, ""); of = $0}
        END {printf "%-8s %9d executions, %4d of %d edges, corpus %s\n", target, n, c, of, k}' \
        "$dir/$target.log"
done
exit $failed
