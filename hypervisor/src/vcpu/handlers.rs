//! What each exit means for the vCPU; nothing here enters the guest, waits or
//! stops anything.

use vmm_shared::control::Counter;
use vmm_shared::pv::Hypercall;

use super::Vcpu;
use super::decode;
use super::exit::{Direction, Exception, Exit, Outcome, PortAccess, StopReason};
use super::lapic::{self, Delivery, LapicEffect};
use super::pv::{HYPERCALL_KICK_CPU, HYPERCALL_SEND_IPI, UNKNOWN_HYPERCALL};
use super::registers::Gpr;
use crate::arch::cpu;
use crate::arch::svm::state::EFER_SVME;
use crate::devices::Width;
use crate::fabric::forward::{Access, Request, Space};
use crate::platform::cpuid::{CpuidVcpu, OsXsave};
use crate::platform::msr::{self, MsrRule, PvMsr, WriteRule};
use crate::vm::Vm;
use crate::vm::paravirtual::Answer;

/// Lengths of instructions without operands in memory, and without prefixes.
mod length {
    pub(super) const CPUID: u64 = 2;
    pub(super) const HLT: u64 = 1;
    pub(super) const MSR: u64 = 2;
    pub(super) const HYPERCALL: u64 = 3;
    pub(super) const XSETBV: u64 = 3;
    pub(super) const CACHE: u64 = 2;
}

/// Delivery mode of an NMI.
const NMI: u8 = 4;
const CR4_OSXSAVE: u64 = 1 << 18;
/// EFER bits the guest may set: SCE, LME, NXE, FFXSR, TCE and the read-only
/// LMA.
const EFER_WRITABLE: u64 = 1 | 1 << 8 | 1 << 10 | 1 << 11 | 1 << 14;
const EFER_LMA: u64 = 1 << 10;
const EFER_LME: u64 = 1 << 8;
/// DR7's bits that can be changed; bit 10 is always set.
const DR7_WRITABLE: u64 = 0xffff_2bff;
/// DR7 after reset.
pub(super) const DR7_RESET: u64 = 0x400;
const CR0_PAGING: u64 = 1 << 31;

impl Vcpu {
    /// Handles an exit at once, if it is a frequent one that changes nothing
    /// which the last entry has decided: what is delivered and what the guest
    /// may end by itself. Otherwise leaves everything as it is.
    pub(super) fn answer(&mut self, exit: Exit, vm: &Vm) -> bool {
        let plain = match exit {
            Exit::Cpuid => true,
            Exit::WriteMsr => match msr::rule(self.registers.get_u32(Gpr::Rcx), vm.machine) {
                MsrRule::X2Apic(lapic::ICR) => true,
                // One that has passed interrupts at once.
                MsrRule::TscDeadline => {
                    let deadline = self.edx_eax();
                    deadline == 0 || deadline > vm.guest_tsc()
                }
                _ => false,
            },
            _ => false,
        };
        // The guest may have changed what it takes: look at all of it again.
        let settled = !self.lapic.has_requests();
        plain && settled && self.handle(exit, vm) == Outcome::Resume
    }

    /// Handles one exit.
    pub(super) fn handle(&mut self, exit: Exit, vm: &Vm) -> Outcome {
        match exit {
            Exit::HostInterrupt => Outcome::Resume,
            Exit::Cpuid => self.cpuid(vm),
            Exit::Halt => {
                self.step_over(length::HLT, vm);
                Outcome::Block
            }
            Exit::Iret => {
                self.nmi.returns(self.registers.rip);
                Outcome::Resume
            }
            Exit::Port(access) => self.port(access, vm),
            Exit::ReadMsr => self.read_msr(vm),
            Exit::WriteMsr => self.write_msr(vm),
            Exit::Hypercall => self.hypercall(vm),
            Exit::Xsetbv => self.xsetbv(vm),
            // Memory is coherent, and another guest's cache lines are not
            // this guest's to drop.
            Exit::CacheInstruction => {
                self.step_over(length::CACHE, vm);
                Outcome::Resume
            }
            Exit::WriteCr8 => self.write_cr8(vm),
            Exit::DebugControl(direction) => self.debug_control(direction, vm),
            Exit::Rdpmc => Outcome::Inject(Exception::GP),
            Exit::Undefined => Outcome::Inject(Exception::UD),
            Exit::Exception { vector: 18, .. } => {
                Outcome::Stop(StopReason::UnknownExit { code: 0x52 })
            }
            Exit::Exception { vector, error } => Outcome::Inject(Exception {
                vector,
                error: (vector == 17).then_some(error),
            }),
            Exit::NestedFault { gpa, error } => self.nested_fault(gpa, error, vm),
            Exit::Shutdown => Outcome::Stop(StopReason::TripleFault {
                rip: self.registers.rip,
            }),
            Exit::InvalidState => Outcome::Stop(StopReason::InvalidState {
                rip: self.registers.rip,
            }),
            Exit::Other { code } => Outcome::Stop(StopReason::UnknownExit { code }),
        }
    }

    /// What WRMSR and XSETBV write.
    fn edx_eax(&self) -> u64 {
        let half = |register| u64::from(self.registers.get_u32(register));
        half(Gpr::Rdx) << 32 | half(Gpr::Rax)
    }

    fn cpuid(&mut self, vm: &Vm) -> Outcome {
        let osxsave = match self.vmcb.save.cr4 & CR4_OSXSAVE {
            0 => OsXsave::Off,
            _ => OsXsave::On,
        };
        let state = CpuidVcpu {
            apic_id: self.lapic.id(),
            osxsave,
            xcr0: cpu::xgetbv0(),
            apic: self.lapic.base().mode(),
        };
        let leaf = self.registers.get_u32(Gpr::Rax);
        let subleaf = self.registers.get_u32(Gpr::Rcx);
        let result = vm.cpuid.get(leaf, subleaf, &state);
        self.registers.set(Gpr::Rax, result.eax.into());
        self.registers.set(Gpr::Rbx, result.ebx.into());
        self.registers.set(Gpr::Rcx, result.ecx.into());
        self.registers.set(Gpr::Rdx, result.edx.into());
        self.step_over(length::CPUID, vm);
        Outcome::Resume
    }

    fn port(&mut self, access: PortAccess, vm: &Vm) -> Outcome {
        let Some(width) = Width::from_bytes(access.width.into()) else {
            vm.count(self.id, Counter::UnknownPort);
            return Outcome::Inject(Exception::GP);
        };
        if access.string {
            return self.string_port(&access, width, vm);
        }
        let value = match access.direction {
            Direction::Out => self.registers.get(Gpr::Rax) & width.mask(),
            Direction::In => 0,
        };
        let wanted = Access {
            space: Space::Ports,
            direction: access.direction,
            width,
            address: access.port.into(),
            value,
        };
        let (value, request) = vm.access(self.id, &wanted);
        if access.direction == Direction::In {
            let rax = match width {
                Width::Dword => value,
                _ => self.registers.get(Gpr::Rax) & !width.mask() | value & width.mask(),
            };
            self.registers.set(Gpr::Rax, rax);
        }
        self.advance_to(access.next_rip);
        match request {
            Request::None => Outcome::Resume,
            Request::Unknown => {
                vm.count(self.id, Counter::UnknownPort);
                Outcome::Resume
            }
            Request::Stop(reason) => Outcome::Stop(reason),
        }
    }

    fn read_msr(&mut self, vm: &Vm) -> Outcome {
        let number = self.registers.get_u32(Gpr::Rcx);
        let value = match msr::rule(number, vm.machine) {
            MsrRule::Fixed { value, .. } => Some(value),
            MsrRule::Stored(stored) => Some(self.msrs.read(stored)),
            MsrRule::ApicBase => Some(self.lapic.base().value()),
            MsrRule::X2Apic(register) => self.lapic.read_msr(register, vm.guest_tsc()).ok(),
            MsrRule::TscDeadline => Some(self.lapic.deadline()),
            MsrRule::Efer => Some(self.vmcb.save.efer & !EFER_SVME),
            MsrRule::Pat => Some(self.vmcb.save.g_pat),
            MsrRule::Tsc => Some(vm.guest_tsc()),
            MsrRule::TscAux => Some(cpu::tsc_aux()),
            MsrRule::Pv(PvMsr::SystemTime) => Some(self.pv.system_time),
            MsrRule::Pv(PvMsr::WallClock) => Some(self.pv.wall_clock),
            MsrRule::Pv(PvMsr::StealTime) => Some(self.pv.steal_time.msr()),
            MsrRule::Pv(PvMsr::EoiEnable) => Some(self.pv.eoi),
            // Not intercepted, so never seen here.
            MsrRule::PassThrough => None,
            MsrRule::Unknown => {
                vm.count(self.id, Counter::UnknownMsr);
                None
            }
        };
        let Some(value) = value else {
            return Outcome::Inject(Exception::GP);
        };
        self.registers.set(Gpr::Rax, value & 0xffff_ffff);
        self.registers.set(Gpr::Rdx, value >> 32);
        self.step_over(length::MSR, vm);
        Outcome::Resume
    }

    fn write_msr(&mut self, vm: &Vm) -> Outcome {
        let number = self.registers.get_u32(Gpr::Rcx);
        let value = self.edx_eax();
        let done = match msr::rule(number, vm.machine) {
            MsrRule::TscDeadline => {
                self.lapic.set_deadline(value);
                true
            }
            MsrRule::X2Apic(register) => {
                let effect = self.lapic.write_msr(register, value, vm.guest_tsc());
                effect.map(|effect| self.settle_apic(effect, vm)).is_ok()
            }
            MsrRule::Fixed { writes, .. } => writes == WriteRule::Ignore,
            MsrRule::Stored(stored) => {
                self.msrs.write(stored, value);
                true
            }
            MsrRule::ApicBase => {
                let done = self.lapic.set_base(value, vm.cpuid.physical_bits());
                self.settle_apic(LapicEffect::Addressed, vm);
                done.is_ok()
            }
            MsrRule::Efer => self.write_efer(value),
            MsrRule::Pat => self.write_pat(value),
            // One clock for all vCPUs: nobody may set it.
            MsrRule::Tsc => true,
            MsrRule::TscAux => u32::try_from(value).map(cpu::set_tsc_aux).is_ok(),
            MsrRule::Pv(PvMsr::SystemTime) => {
                self.pv.set_system_time(value, vm.clock, &vm.memory);
                true
            }
            MsrRule::Pv(PvMsr::WallClock) => {
                self.pv.set_wall_clock(value, vm.boot_wall_ns, &vm.memory);
                true
            }
            MsrRule::Pv(PvMsr::StealTime) => self.pv.steal_time.set_msr(value, &vm.memory).is_ok(),
            MsrRule::Pv(PvMsr::EoiEnable) => {
                self.pv.set_eoi(value);
                true
            }
            MsrRule::PassThrough => false,
            MsrRule::Unknown => {
                vm.count(self.id, Counter::UnknownMsr);
                false
            }
        };
        if !done {
            return Outcome::Inject(Exception::GP);
        }
        self.step_over(length::MSR, vm);
        Outcome::Resume
    }

    /// Does what a write to the local APIC asks for.
    pub(super) fn settle_apic(&mut self, effect: LapicEffect, vm: &Vm) {
        match effect {
            LapicEffect::None => {}
            LapicEffect::Send(ipi) => {
                vm.count(self.id, Counter::IpiSent);
                vm.send(self.lapic.id(), ipi);
            }
            LapicEffect::Ended(vector) => vm.end_of_interrupt(self.id, vector),
            LapicEffect::Addressed => {
                let address = self.lapic.logical_address();
                vm.posted(self.id).set_logical_address(address);
            }
        }
    }

    /// Manual: vol. 2, 3.1.7. LMA follows LME and paging; LME can't change
    /// while paging is on.
    fn write_efer(&mut self, value: u64) -> bool {
        let old = self.vmcb.save.efer;
        let paging = self.vmcb.save.cr0 & CR0_PAGING != 0;
        if value & !EFER_WRITABLE != 0 || paging && (value ^ old) & EFER_LME != 0 {
            return false;
        }
        self.vmcb.save.efer = value & !EFER_LMA | old & EFER_LMA | EFER_SVME;
        true
    }

    /// Each of the eight types must be one that exists.
    fn write_pat(&mut self, value: u64) -> bool {
        let legal = value
            .to_le_bytes()
            .iter()
            .all(|kind| matches!(kind, 0 | 1 | 4..=7));
        if legal {
            self.vmcb.save.g_pat = value;
        }
        legal
    }

    fn xsetbv(&mut self, vm: &Vm) -> Outcome {
        let value = self.edx_eax();
        let legal = self.vmcb.cpl() == 0
            && self.registers.get_u32(Gpr::Rcx) == 0
            && is_legal_xcr0(value, vm.cpuid.supported_xcr0());
        if !legal {
            return Outcome::Inject(Exception::GP);
        }
        cpu::set_guest_xcr0(value);
        self.step_over(length::XSETBV, vm);
        Outcome::Resume
    }

    /// The register that the instruction at RIP moves to or from a control or
    /// debug register, and its length.
    fn mov_special(&self, vm: &Vm) -> Option<(Gpr, u64)> {
        let code = self.fetch(vm)?;
        decode::mov_special(code.as_bytes(), self.vmcb.bitness())
    }

    /// The task priority, when something waits for it.
    fn write_cr8(&mut self, vm: &Vm) -> Outcome {
        let Some((register, len)) = self.mov_special(vm) else {
            return Outcome::Inject(Exception::UD);
        };
        match u8::try_from(self.registers.get(register)) {
            Ok(priority @ 0..=15) => {
                self.lapic.set_cr8(priority);
                self.advance(len);
                Outcome::Resume
            }
            _ => Outcome::Inject(Exception::GP),
        }
    }

    /// A DR7 that remembers and arms nothing, where the real one would stay
    /// armed while the hypervisor runs.
    fn debug_control(&mut self, direction: Direction, vm: &Vm) -> Outcome {
        let Some((register, len)) = self.mov_special(vm) else {
            return Outcome::Inject(Exception::UD);
        };
        match direction {
            Direction::In => self.registers.set(register, self.dr7),
            Direction::Out => {
                let value = self.registers.get(register);
                if value >> 32 != 0 {
                    return Outcome::Inject(Exception::GP);
                }
                self.dr7 = value & DR7_WRITABLE | DR7_RESET;
            }
        }
        self.advance(len);
        Outcome::Resume
    }

    fn hypercall(&mut self, vm: &Vm) -> Outcome {
        if self.vmcb.cpl() != 0 {
            return Outcome::Inject(Exception::UD);
        }
        let argument = |register| self.registers.get(register);
        let result = match argument(Gpr::Rax) {
            HYPERCALL_KICK_CPU => {
                vm.unhalt(argument(Gpr::Rcx));
                0
            }
            HYPERCALL_SEND_IPI => {
                let set = u128::from(argument(Gpr::Rcx)) << 64 | u128::from(argument(Gpr::Rbx));
                let [vector, mode, ..] = argument(Gpr::Rsi).to_le_bytes();
                let send = |delivery| {
                    vm.count(self.id, Counter::IpiSent);
                    vm.send_to_set(set, argument(Gpr::Rdx), delivery)
                };
                match mode & 7 {
                    // Below 16 there is no such interrupt: it reaches nobody.
                    0 if vector < 16 => 0,
                    0 => send(Delivery::Fixed(vector)),
                    NMI => send(Delivery::Nmi),
                    _ => UNKNOWN_HYPERCALL,
                }
            }
            number => {
                let call = Hypercall::from_raw(number);
                match call.and_then(|call| vm.pv_call(call, argument(Gpr::Rcx))) {
                    Some(Answer::Stop(reason)) => return Outcome::Stop(reason),
                    Some(Answer::Memory { gpa, len }) => {
                        self.registers.set(Gpr::Rcx, len);
                        gpa
                    }
                    Some(Answer::Done) => 0,
                    Some(Answer::Refused) | None => UNKNOWN_HYPERCALL,
                }
            }
        };
        self.registers.set(Gpr::Rax, result);
        self.step_over(length::HYPERCALL, vm);
        Outcome::Resume
    }
}

/// What XSETBV accepts: x87 always, AVX only with SSE, AVX-512 as a whole and
/// only with AVX (manual vol. 1, 11.5.2), and nothing that CPUID hides.
pub(super) fn is_legal_xcr0(value: u64, supported: u64) -> bool {
    const X87: u64 = 1;
    const SSE: u64 = 1 << 1;
    const AVX: u64 = 1 << 2;
    const AVX512: u64 = 7 << 5;
    value & !supported == 0
        && value & X87 != 0
        && (value & AVX == 0 || value & SSE != 0)
        && (value & AVX512 == 0 || value & AVX512 == AVX512 && value & AVX != 0)
}

#[cfg(test)]
mod tests {
    use super::is_legal_xcr0;

    #[test]
    fn only_consistent_state_sets_can_be_switched_on() {
        for legal in [1, 3, 7, 0xe7] {
            assert!(is_legal_xcr0(legal, 0xe7), "{legal:#x}");
        }
        for illegal in [0, 2, 5, 6, 0x27, 0xe3, 0x1e7, 1 << 63] {
            assert!(!is_legal_xcr0(illegal, 0xe7), "{illegal:#x}");
        }
        assert!(!is_legal_xcr0(7, 3));
    }
}
