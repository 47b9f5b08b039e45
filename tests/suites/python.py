"""Runs test modules of CPython: a line for each case, "RESULT CASE".

A case that says nothing for LIMIT seconds is "hangs"; one that ends its
process is "dies"; the module goes on behind it.
"""

import os
import queue
import random
import signal
import subprocess
import sys
import threading

LIMIT = 120


def child(name, skip):
    """Runs a module's cases but those in `skip`."""
    import unittest

    class Lines(unittest.TestResult):
        def say(self, result, test):
            os.write(3, f"{result} {test.id()}\n".encode())

        def startTest(self, test):
            super().startTest(test)
            self.failed = False
            self.say("start", test)

        def stopTest(self, test):
            super().stopTest(test)
            if self.failed:
                self.say("FAIL", test)

        def addSuccess(self, test):
            if not self.failed:
                self.say("ok", test)

        def bad(self, test, error):
            self.failed = True
            sys.stderr.write(self._exc_info_to_string(error, test))
            if not isinstance(test, unittest.TestCase):
                self.say("FAIL", test)

        addError = addFailure = bad

        def addSubTest(self, test, subtest, error):
            if error is not None:
                self.bad(test, error)

        def addSkip(self, test, reason):
            self.say("skip", test)

        def addExpectedFailure(self, test, error):
            self.say("ok", test)

        def addUnexpectedSuccess(self, test):
            self.failed = True

    def wanted(suite):
        for test in suite:
            if isinstance(test, unittest.TestSuite):
                yield from wanted(test)
            elif test.id() not in skip:
                yield test

    os.set_inheritable(3, False)
    import test.support
    test.support.verbose = False
    try:
        suite = unittest.defaultTestLoader.loadTestsFromName("test." + name)
    except unittest.SkipTest:
        os.write(3, f"skip {name}\n".encode())
        return
    class_suite = {}
    for case in wanted(suite):
        class_suite.setdefault(type(case), unittest.TestSuite()).addTest(case)
    unittest.TestSuite(class_suite.values()).run(Lines())


def reader(pipe, lines):
    for line in pipe:
        lines.put(line.decode().split())
    lines.put(None)


def module(name, place):
    done = set()
    while True:
        out, into = os.pipe()
        runs = subprocess.Popen(
            [sys.executable, __file__, "--child", name, *done],
            stdin=subprocess.DEVNULL,
            stdout=2,
            preexec_fn=lambda: (os.dup2(into, 3), place()),
            pass_fds=[3],
            start_new_session=True,
        )
        os.close(into)
        lines = queue.Queue()
        threading.Thread(target=reader, args=(open(out, "rb"), lines), daemon=True).start()
        current = None
        while True:
            try:
                line = lines.get(timeout=LIMIT)
            except queue.Empty:
                line, ended = None, "hangs"
            else:
                ended = "dies"
            if line is None:
                break
            result, case = line
            if result == "start":
                current = case
            else:
                if case == current:
                    current = None
                done.add(case)
                print(result, case, flush=True)
        try:
            os.killpg(runs.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        runs.wait()
        if current is None:
            if ended == "hangs":
                print("hangs", name, flush=True)
            return
        done.add(current)
        print(ended, current, flush=True)


if sys.argv[1] == "--child":
    child(sys.argv[2], set(sys.argv[3:]))
else:
    cpus = sorted(os.sched_getaffinity(0))

    def place():
        # It begins there; its threads go where they like.
        os.sched_setaffinity(0, {random.choice(cpus)})
        os.sched_setaffinity(0, cpus)

    for name in sys.argv[1:]:
        module(name, place)
