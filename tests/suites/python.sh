#!/bin/sh
# CPython's own tests of what a kernel does, with the stock python3. Its
# support modules are those of the installed library.
set -eu
cp -rn /usr/lib/python3.11/test/. lib/test/
export PYTHONPATH="$PWD/lib"
mkdir -p work && cd work
# shellcheck disable=SC2086 # a list of words
exec python3 ../python.py ${MODULES:-test_threading test_thread test_queue test_signal test_mmap \
    test_subprocess test_selectors test_epoll test_poll test_select test_fcntl test_posix test_os \
    test_popen test_pty test_wait3 test_wait4 test_fork1 test_eintr test_time test_resource \
    test_tempfile test_shutil test_glob test_largefile test_socket test_socketserver}
