//! A rack that is up.

use std::cell::RefCell;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::{Bench, Finished, alarms};

/// A rack that is up, as its console shows it.
#[derive(Debug)]
pub struct Up {
    /// Where it runs.
    pub bench: Bench,
    /// Its name.
    pub name: &'static str,
}

impl Up {
    /// Brings one up, with the small root.
    ///
    /// # Panics
    /// If it does not come up.
    #[must_use]
    pub fn start(name: &'static str, words: &[&str]) -> Self {
        let bench = Bench::new();
        bench.up(name, &[words, &["--rootfs", "busybox"]].concat());
        Self { bench, name }
    }

    /// `viaduct WORDS…` for this rack.
    #[must_use]
    pub fn console(&self, words: &[&str]) -> Finished {
        self.bench.viaduct(self.named(words))
    }

    /// The words with the rack's name.
    pub fn named<'a>(&'a self, words: &[&'a str]) -> Vec<&'a str> {
        let name = ["--name", self.name];
        words.iter().copied().chain(name).collect()
    }

    /// What `viaduct WORDS… --json` prints.
    ///
    /// # Panics
    /// If that fails.
    #[must_use]
    pub fn json(&self, words: &[&str]) -> Value {
        let done = self.console(&[words, &["--json"]].concat()).well();
        serde_json::from_slice(&done.stdout).expect("JSON")
    }

    /// What a command in the guest prints.
    ///
    /// # Panics
    /// If that fails.
    #[must_use]
    pub fn guest(&self, command: &[&str]) -> String {
        self.bench.exec(self.name, command).finish().well().out()
    }

    /// Waits until these nodes and the launcher have the same tables; what
    /// `status` says then.
    ///
    /// # Panics
    /// If replicas differ.
    #[must_use]
    pub fn wait_for_equal_replicas(&self, nodes: &[usize]) -> Value {
        let last = RefCell::new(Value::Null);
        self.bench.wait_until("all replicas are equal", || {
            let now = self.json(&["status"]);
            let wanted = &now["cluster"];
            let at = wanted["position"].as_u64().expect("a position");
            let equal = nodes.iter().all(|node| {
                let replica = &now["nodes"][*node]["replica"];
                let is_there = replica["position"].as_u64() == Some(at);
                let same = replica["digest"] == wanted["digest"];
                assert!(!is_there || same, "node {node} differs: {now:#}");
                is_there
            });
            last.replace(now);
            equal
        });
        last.into_inner()
    }

    /// The process of a node.
    ///
    /// # Panics
    /// If there is no such node.
    #[must_use]
    pub fn pid(&self, node: usize) -> Pid {
        let pid = self.json(&["nodes"])[node]["pid"].as_i64();
        let pid = pid.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        pid.expect("a process")
    }

    /// Kills a node, and waits until that is noticed.
    ///
    /// # Panics
    /// If it does not run.
    pub fn kill(&self, node: usize) {
        self.kill_process(node, self.pid(node));
    }

    /// The same, by what [`pid`](Self::pid) said.
    ///
    /// # Panics
    /// If it does not run.
    pub fn kill_process(&self, node: usize, pid: Pid) {
        kill_process(pid, Signal::KILL).expect("it runs");
        let state = format!("/{node}/state");
        self.bench.wait_until("its end is noticed", || {
            self.json(&["nodes"]).pointer(&state) == Some(&"stopped".into())
        });
    }

    /// The guest still does what it is told.
    ///
    /// # Panics
    /// If it does not.
    pub fn assert_alive(&self) {
        assert_eq!(self.guest(&["echo", "alive"]), "alive\n");
    }

    /// `viaduct WORDS…` ends so, and says these things in one line.
    ///
    /// # Panics
    /// If it does not.
    pub fn refused(&self, words: &[&str], status: i32, facts: &[&str]) {
        let done = self.console(words);
        let said = done.err();
        assert_eq!(done.status, status, "{words:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{words:?}: {said}");
        for fact in facts {
            assert!(said.contains(fact), "{words:?}: no {fact:?} in {said}");
        }
    }

    /// The guest's log holds nothing that a healthy guest's does not.
    ///
    /// # Panics
    /// If it does.
    pub fn assert_healthy(&self) {
        assert_eq!(alarms(&self.guest(&["dmesg"])), Vec::<&str>::new());
    }

    /// Takes it down; nothing is left.
    ///
    /// # Panics
    /// If something is.
    pub fn down(self) {
        self.bench.down(self.name);
        self.bench.assert_nothing_left();
    }
}
