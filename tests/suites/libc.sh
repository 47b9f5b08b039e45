#!/bin/sh
# musl's libc-test: each program says what it finds wrong, and ends with 1 then.
set -eu
for program in functional/* regression/*; do
    status=0
    timeout -s KILL 100 "./$program" >&2 </dev/null || status=$?
    case $status in
    0) echo "ok $program" ;;
    137) echo "hangs $program" ;;
    *) echo "FAIL $program" ;;
    esac
done
