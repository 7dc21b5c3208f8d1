#!/bin/sh
# Each of the 122 requirements is accounted for once, by a test that exists or a reason. usage: requirements.sh BUILD
cd "$(dirname "$0")" || exit 1
ctest --test-dir "$1" -N | sed -n 's/^ *Test *#[0-9]*: //p' | sort >"/tmp/requirements-$$" || exit 1
awk -F' *[|] *' -v tests="/tmp/requirements-$$" '
BEGIN { while ((getline name <tests) > 0) known[name] = 1 }
$2 ~ /^[0-9]+$/ {
    if (seen[$2]++) { print $2 " is there twice"; bad = 1 }
    if ($4 !~ /^n\/a: ....../ && $4 !~ /^`/) { print $2 ": neither a test nor a reason"; bad = 1 }
    n = split($4, word, "`")
    for (i = 2; i <= n && $4 ~ /^`/; i += 2) if (!(word[i] in known)) { print $2 ": no test " word[i]; bad = 1 }
}
END {
    for (i = 1; i <= 122; i++) if (!seen[i]) { print i " is missing"; bad = 1 }
    exit bad
}' requirements.md
status=$?
rm -f "/tmp/requirements-$$"
exit $status
