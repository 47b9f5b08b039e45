//! What the paravirtual guest asks for, and how it hears of what is lost.

use vmm_shared::addr::Gpa;
use vmm_shared::pv::{Hypercall, LOSS_VECTOR};

use super::Vm;
use crate::vcpu::exit::StopReason;

/// The answer to a hypercall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It has been done.
    Done,
    /// It can't be done.
    Refused,
    /// Memory from an address on, and how much.
    Memory {
        /// First byte.
        gpa: u64,
        /// Bytes.
        len: u64,
    },
    /// The guest wants this.
    Stop(StopReason),
}

impl Vm {
    /// Does what the paravirtual guest asks for; no other guest may ask.
    pub fn pv_call(&self, call: Hypercall, argument: u64) -> Option<Answer> {
        if !self.machine.is_paravirtual() {
            return None;
        }
        Some(match call {
            Hypercall::RingLauncher => {
                self.fabric().ring_launcher();
                Answer::Done
            }
            Hypercall::PowerOff => Answer::Stop(StopReason::PowerOff),
            Hypercall::Crash => Answer::Stop(StopReason::GuestFailed),
            Hypercall::Survive => match self.memory.pieces_below(Gpa(argument)) {
                Some(pieces) => {
                    self.fabric().control().vm().set_vital_pieces(pieces);
                    Answer::Done
                }
                None => Answer::Refused,
            },
            Hypercall::NextLost => {
                let lost = self.fabric().control().losses().nodes();
                let next = self.memory.next_lost(Gpa(argument), lost);
                let next = next.unwrap_or(u64::MAX..u64::MAX);
                Answer::Memory {
                    gpa: next.start,
                    len: next.end - next.start,
                }
            }
        })
    }

    /// Parts from the memory of nodes that have been lost and that the guest
    /// goes on without. For any core, outside of the guest, without locks.
    pub fn part_from_lost(&self) {
        // Every exit comes here; other guests are frozen instead.
        if !self.machine.is_paravirtual() {
            return;
        }
        let record = self.fabric().control().losses();
        let lost = record.nodes();
        if lost == self.memory.parted() {
            return;
        }
        // Whoever holds the lock is doing it.
        let Some(_turn) = self.parting.try_lock() else {
            return;
        };
        // All vCPUs, as one of another node may come here. Before the memory
        // goes: none runs a program without having taken the interrupt.
        for vcpu in self.vcpus().filter(|vcpu| !record.has_lost(*vcpu)) {
            self.post(vcpu, LOSS_VECTOR);
        }
        if let Err(why) = self.memory.part_from(lost) {
            log::error!("what is lost stays mapped: {why}");
        }
    }
}
