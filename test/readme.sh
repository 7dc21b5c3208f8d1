#!/bin/sh
# What the README says must be what the program does. usage: readme.sh PROGRAM README.md
program=$1 readme=$2
want=$("$program" --help) || exit 1
have=$(sed -n '/^    dot-proxy \[options\]$/,/^    *-h, --help/p' "$readme" | sed 's/^    //')
[ "$have" = "$want" ] && exit 0
echo "the README's block of options is not what --help prints:"
echo "$want" >/tmp/readme-help.$$
echo "$have" | diff /tmp/readme-help.$$ -
rm -f /tmp/readme-help.$$
exit 1
