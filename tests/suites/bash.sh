#!/bin/sh
# Bash's own tests with the stock bash: "ok SCRIPT" if it says nothing, for a
# script compares what comes out with what is right.
set -eu
cd tests
export THIS_SH=/bin/bash PATH="$PWD:$PATH" BUILD_DIR="$PWD" LC_ALL=C
for script in run-*; do
    case $script in run-all | run-minimal | *~ | *.orig) continue ;; esac
    export TMPDIR="$PWD/tmp" BASH_TSTOUT="$PWD/tstout"
    rm -rf tmp && mkdir tmp
    status=0
    timeout -s KILL 200 sh "./$script" >../said 2>&1 </dev/null || status=$?
    # Some scripts warn of what they may not like.
    if [ "$status" -eq 137 ]; then
        result=hangs
    elif grep -v -i '^warning:' ../said >../bad; then
        result=FAIL
    else
        result=ok
    fi
    echo "$result $script"
    [ "$result" = ok ] || sed "s/^/$script: /" ../bad >&2
done
