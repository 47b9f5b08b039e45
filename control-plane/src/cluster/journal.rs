//! The journal: who changed what, and what came of it.
//!
//! Each operation, refused ones too, leaves a record: the audit line of a
//! change, and the event that others can wait for. It is part of the state,
//! so every node has it and a new control role finds it.

use alloc::collections::VecDeque;
use core::fmt;

use vmm_shared::log::At;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::apply::{Done, Refusal};
use super::{Change, Op};

/// Records that are kept.
pub const KEPT: usize = 512;

/// One operation and its outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Record {
    position: u64,
    op: Op,
    /// The job that was started or joined, or 0.
    job: u32,
    member: u16,
    /// 0, or the [code](Refusal::code) of the refusal.
    refusal: u8,
    reserved: u8,
}

impl Record {
    pub(crate) fn new(at: At, op: Op, outcome: &Result<Done, Refusal>) -> Self {
        let member = u16::try_from(at.member.index()).expect("few members");
        let (job, refusal) = match outcome {
            Ok(Done::Started { job } | Done::Joined { job }) => (job.0, 0),
            Ok(Done::Applied | Done::Nothing) => (0, 0),
            Err(refusal) => (0, refusal.code().0),
        };
        Self {
            position: at.position,
            op,
            job,
            member,
            refusal,
            reserved: 0,
        }
    }

    /// Where it stands in the log.
    #[must_use]
    pub const fn position(&self) -> u64 {
        self.position
    }

    /// Which member appended it.
    #[must_use]
    pub const fn member(&self) -> u16 {
        self.member
    }

    /// What was to be changed; `None` if it was no operation.
    #[must_use]
    pub fn change(&self) -> Option<Change> {
        self.op.change()
    }

    /// The job that was started or joined.
    #[must_use]
    pub const fn job(&self) -> Option<u32> {
        if self.job == 0 { None } else { Some(self.job) }
    }

    /// The code of the refusal, if it took no effect.
    #[must_use]
    pub const fn refusal(&self) -> Option<u8> {
        if self.refusal == 0 {
            None
        } else {
            Some(self.refusal)
        }
    }
}

impl fmt::Display for Record {
    /// The audit line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{} member {}: ", self.position, self.member)?;
        match self.change() {
            None => f.write_str("garbage")?,
            Some(change) => change.fmt(f)?,
        }
        if let Some(job) = self.job() {
            write!(f, " -> job {job}")?;
        }
        match self.refusal() {
            Some(code) => write!(f, " -> refused ({code})"),
            None => Ok(()),
        }
    }
}

/// The last records, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Journal(VecDeque<Record>);

impl Journal {
    pub(crate) fn add(&mut self, record: Record) {
        if self.0.len() == KEPT {
            self.0.pop_front();
        }
        self.0.push_back(record);
    }

    /// The log position behind the last record, or 0.
    pub(crate) fn end(&self) -> u64 {
        self.0.back().map_or(0, |last| last.position + 1)
    }

    /// The records from a log position on, oldest first.
    pub fn since(&self, position: u64) -> impl Iterator<Item = &Record> {
        self.0
            .iter()
            .filter(move |record| record.position >= position)
    }
}
