#!/bin/sh
# No function may be longer than 40 lines. usage: lengths.sh FILE...
exec awk '
FNR == 1 { depth = 0 }
/^namespace/ || /^}  \/\/ namespace/ { next }
{
    line = $0
    sub(/\/\/.*/, "", line)
    gsub(/"([^"\\]|\\.)*"|'"'[^']*'"'/, "", line)
    inside = (class == "" ? 0 : 1)
    if (depth == 0 && line ~ /^(class|struct) [^;]*\{$/) class = line
    else if (depth == inside && line ~ /^ *[A-Za-z].*[({,:]/) { start = FNR; name = $0 }
    opened = gsub(/\{/, "{", line); closed = gsub(/\}/, "}", line)
    before = depth
    depth += opened - closed
    if (depth == 0 && before > 0 && class != "") class = ""
    else if (before > inside && depth == inside || (opened && depth == inside)) {
        if (FNR - start + 1 > longest) { longest = FNR - start + 1; where = FILENAME ":" start ": " name }
    }
}
END { print "longest function: " longest " lines, " where; exit longest > 40 }' "$@"
