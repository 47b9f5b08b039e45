//! Signals: what a process does about each, and which wait.

use alloc::vec::Vec;

use linux_raw_sys::general::{
    SIGCHLD, SIGCONT, SIGKILL, SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU, SIGURG, SIGWINCH,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Signals there are, from 1 on.
pub(crate) const SIGNALS: u8 = 64;
/// Real-time signals, which queue up, start here.
const FIRST_QUEUED: u8 = 32;
/// Most queued signals of one process or thread.
const MOST_QUEUED: usize = 1024;

pub(crate) const SIG_DEFAULT: u64 = 0;
pub(crate) const SIG_IGNORE: u64 = 1;

/// The bit of a signal in a set.
pub(crate) const fn bit(signal: u8) -> u64 {
    match signal {
        1..=SIGNALS => 1 << (signal - 1),
        _ => 0,
    }
}

/// Signals that can be neither blocked nor caught.
pub(crate) const UNBLOCKABLE: u64 = 1 << (SIGKILL - 1) | 1 << (SIGSTOP - 1);
/// Signals that stop a process by default.
pub(crate) const STOPPING: u64 =
    1 << (SIGSTOP - 1) | 1 << (SIGTSTP - 1) | 1 << (SIGTTIN - 1) | 1 << (SIGTTOU - 1);
/// Signals that do nothing by default.
const IGNORED: u64 =
    1 << (SIGCHLD - 1) | 1 << (SIGURG - 1) | 1 << (SIGWINCH - 1) | 1 << (SIGCONT - 1);

/// What is done about a signal: the kernel's `sigaction`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct Action {
    pub(crate) handler: u64,
    pub(crate) flags: u64,
    pub(crate) restorer: u64,
    pub(crate) mask: u64,
}

/// What happens when a signal arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    Ignore,
    Terminate,
    Stop,
    Handle(Action),
}

/// The actions of a process.
#[derive(Clone, Debug)]
pub(crate) struct Actions([Action; SIGNALS as usize]);

impl Default for Actions {
    fn default() -> Self {
        Self([Action::default(); SIGNALS as usize])
    }
}

impl Actions {
    /// The action for a signal from 1 to [`SIGNALS`].
    pub(crate) fn get_mut(&mut self, signal: u8) -> Option<&mut Action> {
        self.0.get_mut(usize::from(signal).checked_sub(1)?)
    }

    /// The signals that a program has said to ignore, and those that it has
    /// handlers for.
    pub(crate) fn sets(&self) -> (u64, u64) {
        let (mut ignored, mut handled) = (0, 0);
        for (at, action) in self.0.iter().enumerate() {
            match action.handler {
                SIG_IGNORE => ignored |= 1 << at,
                SIG_DEFAULT => {}
                _ => handled |= 1 << at,
            }
        }
        (ignored, handled)
    }

    pub(crate) fn effect(&self, signal: u8) -> Effect {
        let action = usize::from(signal)
            .checked_sub(1)
            .and_then(|at| self.0.get(at));
        let handler = action.map_or(SIG_DEFAULT, |action| action.handler);
        match (action, handler) {
            (_, SIG_IGNORE) => Effect::Ignore,
            (Some(action), handler) if handler != SIG_DEFAULT => Effect::Handle(*action),
            _ if bit(signal) & IGNORED != 0 => Effect::Ignore,
            _ if bit(signal) & STOPPING != 0 => Effect::Stop,
            _ => Effect::Terminate,
        }
    }

    /// A new program has no handlers; what was ignored stays so.
    pub(crate) fn exec(&mut self) {
        for action in &mut self.0 {
            let kept = match action.handler {
                SIG_IGNORE => SIG_IGNORE,
                _ => SIG_DEFAULT,
            };
            *action = Action {
                handler: kept,
                ..Action::default()
            };
        }
    }
}

/// What a signal says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Info {
    pub(crate) signal: u8,
    pub(crate) code: i32,
    /// The first words of the part that depends on the signal: sender and
    /// user, or the address of a fault.
    pub(crate) words: [u64; 3],
}

impl Info {
    /// From a process.
    pub(crate) fn from_process(signal: u8, code: i32, pid: u32, uid: u32) -> Self {
        Self {
            signal,
            code,
            words: [u64::from(uid) << 32 | u64::from(pid), 0, 0],
        }
    }

    /// From the kernel.
    pub(crate) fn from_kernel(signal: u8) -> Self {
        Self {
            signal,
            code: 0x80,
            words: [0; 3],
        }
    }

    /// The program's `siginfo_t`.
    pub(crate) fn to_bytes(self) -> [u8; 128] {
        let mut bytes = [0; 128];
        bytes[0..4].copy_from_slice(&u32::from(self.signal).to_le_bytes());
        bytes[8..12].copy_from_slice(&self.code.to_le_bytes());
        for (place, word) in bytes[16..40].chunks_mut(8).zip(self.words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// Signals that wait.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pending {
    set: u64,
    infos: Vec<Info>,
}

impl Pending {
    pub(crate) fn set(&self) -> u64 {
        self.set
    }

    pub(crate) fn add(&mut self, info: Info) {
        let queues = info.signal >= FIRST_QUEUED && self.infos.len() < MOST_QUEUED;
        if self.set & bit(info.signal) == 0 || queues {
            self.infos.push(info);
        }
        self.set |= bit(info.signal);
    }

    /// Takes the first signal that is in `allowed`: faults before others,
    /// then the lowest number.
    pub(crate) fn take(&mut self, allowed: u64) -> Option<Info> {
        const FAULTS: u64 = bit(4) | bit(5) | bit(7) | bit(8) | bit(11) | bit(31);
        let ready = self.set & allowed;
        let first = match ready & FAULTS {
            0 => ready,
            faults => faults,
        };
        if first == 0 {
            return None;
        }
        let signal = u8::try_from(first.trailing_zeros() + 1).ok()?;
        let at = self.infos.iter().position(|info| info.signal == signal);
        let info = at.map_or_else(|| Info::from_kernel(signal), |at| self.infos.remove(at));
        if !self.infos.iter().any(|info| info.signal == signal) {
            self.set &= !bit(signal);
        }
        Some(info)
    }

    /// One of those that wait.
    pub(crate) fn find(&mut self, wanted: impl Fn(&Info) -> bool) -> Option<&mut Info> {
        self.infos.iter_mut().find(|info| wanted(info))
    }

    /// Drops signals in a set.
    pub(crate) fn drop(&mut self, set: u64) {
        self.set &= !set;
        self.infos.retain(|info| bit(info.signal) & set == 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn real_time_signals_queue_and_others_do_not() {
        let mut pending = Pending::default();
        for code in 0..3 {
            pending.add(Info::from_process(15, code, 1, 0));
            pending.add(Info::from_process(34, code, 1, 0));
        }
        assert_eq!(pending.set(), bit(15) | bit(34));
        assert_eq!(pending.take(bit(34)).map(|info| info.code), Some(0));
        assert_eq!(pending.take(u64::MAX).map(|info| info.signal), Some(15));
        assert_eq!(pending.take(u64::MAX).map(|info| info.code), Some(1));
        assert_eq!(pending.take(u64::MAX).map(|info| info.code), Some(2));
        assert_eq!(pending.take(u64::MAX), None);
    }

    #[test]
    fn faults_come_first() {
        let mut pending = Pending::default();
        pending.add(Info::from_kernel(1));
        pending.add(Info::from_kernel(11));
        assert_eq!(pending.take(u64::MAX).map(|info| info.signal), Some(11));
        assert_eq!(pending.take(0), None);
    }

    #[test]
    fn a_new_program_keeps_only_what_is_ignored() {
        let mut actions = Actions::default();
        actions.get_mut(2).expect("exists").handler = SIG_IGNORE;
        actions.get_mut(3).expect("exists").handler = 0x1234;
        assert!(matches!(actions.effect(3), Effect::Handle(_)));
        actions.exec();
        assert_eq!(actions.effect(2), Effect::Ignore);
        assert_eq!(actions.effect(3), Effect::Terminate);
        assert_eq!(actions.effect(17), Effect::Ignore);
        assert_eq!(actions.effect(20), Effect::Stop);
        assert!(actions.get_mut(0).is_none() && actions.get_mut(65).is_none());
    }
}
