//! CPUs, threads that stay on them, and waiting for each other.
#![expect(unsafe_code, reason = "binds threads by the C library")]

use std::fmt;
use std::fs;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::Failure;

/// The CPUs that take part: two at least.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cpus(Vec<usize>);

impl Cpus {
    /// Numbers with commas between them.
    pub(crate) fn parse(list: &str) -> Option<Self> {
        let cpus: Result<Vec<usize>, _> = list.split(',').map(str::parse).collect();
        cpus.ok().filter(|cpus| cpus.len() > 1).map(Self)
    }

    /// The first CPU of each NUMA node, and the next ones if that is only one.
    pub(crate) fn of_all_nodes() -> Result<Self, Failure> {
        let first = |node: usize| {
            let list = format!("/sys/devices/system/node/node{node}/cpulist");
            let list = fs::read_to_string(list).ok()?;
            let digits: String = list.chars().take_while(char::is_ascii_digit).collect();
            digits.parse().ok()
        };
        let mut cpus: Vec<usize> = (0..64).filter_map(first).collect();
        if cpus.len() < 2 {
            let all = std::thread::available_parallelism().map_or(1, usize::from);
            cpus = (0..all.min(2)).collect();
        }
        if cpus.len() < 2 {
            return Err("there is but one CPU".into());
        }
        Ok(Self(cpus))
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    /// Runs `role(0)`, `role(1)`, … at the same time, each on a CPU of its
    /// own (by turns if there are more roles than CPUs), and returns what they
    /// return, in that order.
    pub(crate) fn run<T: Send>(&self, roles: usize, role: impl Fn(usize) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..roles)
                .map(|number| {
                    let role = &role;
                    let cpu = self.0[number % self.0.len()];
                    scope.spawn(move || {
                        pin(cpu);
                        role(number)
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("roles return what went wrong"))
                .collect()
        })
    }
}

impl fmt::Display for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&numbers.join(","))
    }
}

/// Keeps the calling thread on a CPU.
fn pin(cpu: usize) {
    // SAFETY: an all-zero set is an empty one; CPU_SET checks the number.
    let done = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set)
    };
    assert_eq!(done, 0, "there is no CPU {cpu}");
}

/// Waits, busily, until something is so.
pub(crate) fn wait_until(condition: impl Fn() -> bool) {
    let mut tries = 0_u32;
    while !condition() {
        tries = tries.wrapping_add(1);
        // In case two roles share a CPU, or a daemon wants it.
        if tries.is_multiple_of(4096) {
            std::thread::yield_now();
        }
        std::hint::spin_loop();
    }
}

/// A place where all roles meet, again and again.
#[derive(Debug)]
pub(crate) struct Meeting {
    roles: u32,
    came: AtomicU32,
    met: AtomicU32,
}

impl Meeting {
    /// For so many roles.
    pub(crate) fn new(roles: usize) -> Self {
        Self {
            roles: u32::try_from(roles).expect("few"),
            came: AtomicU32::new(0),
            met: AtomicU32::new(0),
        }
    }

    /// Waits for all of them.
    pub(crate) fn meet(&self) {
        let before = self.met.load(Ordering::SeqCst);
        if self.came.fetch_add(1, Ordering::SeqCst) + 1 == self.roles {
            self.came.store(0, Ordering::SeqCst);
            self.met.store(before.wrapping_add(1), Ordering::SeqCst);
        } else {
            wait_until(|| self.met.load(Ordering::SeqCst) != before);
        }
    }
}
