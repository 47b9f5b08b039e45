#!/bin/sh
# BusyBox's own tests with the stock static binary: "RESULT CASE".
set -eu
# The old tests find commands by their names as well.
export bindir="$PWD" tsdir="$PWD/testsuite" SKIP_KNOWN_BUGS="" PATH="$PWD/runtest-tempdir-links:$PATH"
cd testsuite
# A case is what runtest says of it; all that it says is kept, too.
LC_ALL=C.UTF-8 timeout -s KILL 2400 ./runtest -v </dev/null 2>&1 | tee /dev/stderr |
    sed -u -n -e 's/^PASS: /ok /p' -e 's/^FAIL: /FAIL /p' -e 's/^UNTESTED: /skip /p'
