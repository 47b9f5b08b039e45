//! Accesses to guest physical addresses that are not RAM.

use vmm_shared::addr::{Gpa, Gva};
use vmm_shared::coherence::{Access, Place};
use vmm_shared::control::Counter;

use super::Vcpu;
use super::decode::{self, MmioAccess};
use super::exit::{Direction, Exception, Exit, Outcome, StopReason};
use super::registers::Gpr;
use crate::devices::Width;
use crate::fabric::forward::{Access as DeviceAccess, Request, Space};
use crate::mem::coherent::{MemoryError, Resolution};
use crate::mem::walk::{self, FetchedInstruction, Privilege};
use crate::vm::Vm;

const FAULT_WRITE: u64 = 1 << 1;
const FAULT_FETCH: u64 = 1 << 4;
const FAULT_TABLE_WALK: u64 = 1 << 33;

impl Vcpu {
    /// Memory that this node has to ask for, a device register, or nothing at
    /// all: reads of nothing give ones, writes to it are dropped, both are
    /// counted.
    pub(super) fn nested_fault(&mut self, gpa: Gpa, error: u64, vm: &Vm) -> Outcome {
        let kind = match error {
            _ if error & FAULT_WRITE != 0 => Access::Write,
            _ if error & FAULT_FETCH != 0 => Access::Execute,
            _ => Access::Read,
        };
        if !Vm::has_device_at(gpa) {
            match vm.memory.guest_fault(self.core, self.place(), gpa, kind) {
                Ok(Resolution::Mapped) => return Outcome::Resume,
                Ok(Resolution::NotMemory) => {}
                Err(why) => {
                    log::error!("{why}");
                    return Outcome::Stop(StopReason::Incoherent { gpa });
                }
            }
        }
        // The instruction is executed here, which may wait for a node that
        // needs what it held.
        self.note_instruction(vm);
        if error & (FAULT_FETCH | FAULT_TABLE_WALK) != 0 || self.vmcb.has_event() {
            // Code, page tables, a descriptor table or a stack where there is
            // no memory. A real bus would give ones; nothing sensible can
            // follow from them. RIP says nothing about such an access.
            vm.count(self.id, Counter::UnknownAddress);
            return Outcome::Inject(Exception::GP);
        }
        let access = match self.decode_access(vm) {
            Ok(access) => access,
            Err(outcome) => return outcome(gpa),
        };
        vm.count(self.id, Counter::Decoded);
        if let Some(offset) = self.lapic.window_offset(gpa) {
            self.access_apic(offset, &access, vm);
            self.advance(access.len);
            return Outcome::Resume;
        }
        let device = |direction, value| {
            let access = DeviceAccess {
                space: Space::Memory,
                direction,
                width: access.width,
                address: gpa.0,
                value,
            };
            let (value, request) = vm.access(self.id, &access);
            if request == Request::Unknown {
                vm.count(self.id, Counter::UnknownAddress);
            }
            value
        };
        let loaded = if access.reads() {
            device(Direction::In, 0)
        } else {
            0
        };
        let stored = access.complete(&mut self.registers, loaded);
        if let Some(value) = stored {
            device(Direction::Out, value);
        }
        self.advance(access.len);
        Outcome::Resume
    }

    /// Where the guest is.
    fn place(&self) -> Place {
        Place {
            rip: self.registers.rip,
            rcx: self.registers.get(Gpr::Rcx),
        }
    }

    /// Lets other nodes have what the guest has used, if the exit shows that
    /// it has.
    pub(super) fn note_progress(&self, exit: &Exit, vm: &Vm) {
        match exit {
            Exit::NestedFault { .. } => {}
            Exit::HostInterrupt => {
                report(vm.memory.guest_was_interrupted(self.core, self.place()));
            }
            _ => self.note_instruction(vm),
        }
    }

    fn note_instruction(&self, vm: &Vm) {
        report(vm.memory.guest_got_on(self.core));
    }

    /// An access to the local APIC's window, which knows only 32 bits at once.
    fn access_apic(&mut self, offset: u64, access: &MmioAccess, vm: &Vm) {
        let whole = access.width == Width::Dword;
        let now = vm.guest_tsc();
        let loaded = match access.reads() && whole {
            true => self.lapic.read_window(offset, now),
            false => 0,
        };
        let stored = access.complete(&mut self.registers, loaded.into());
        if let Some(value) = stored.filter(|_| whole) {
            let value = u32::try_from(value).expect("as wide as the access");
            let effect = self.lapic.write_window(offset, value, now);
            self.settle_apic(effect, vm);
        }
    }

    /// For whom the guest accesses memory.
    pub(super) fn privilege(&self) -> Privilege {
        match self.vmcb.cpl() {
            3 => Privilege::User,
            _ => Privilege::Supervisor,
        }
    }

    /// The instruction at RIP, as far as it can be read.
    pub(super) fn fetch(&self, vm: &Vm) -> Option<FetchedInstruction> {
        let paging = self.vmcb.paging(&self.registers);
        let linear = Gva(self.vmcb.linear_rip(&self.registers));
        walk::fetch(&vm.memory, &paging, self.privilege(), linear).ok()
    }

    fn decode_access(&self, vm: &Vm) -> Result<MmioAccess, impl FnOnce(Gpa) -> Outcome + use<>> {
        let rip = self.registers.rip;
        let unemulated = move |gpa| Outcome::Stop(StopReason::Unemulated { rip, gpa });
        let bytes = self.fetch(vm).ok_or(unemulated)?;
        decode::decode(bytes.as_bytes(), rip, self.vmcb.bitness(), &self.registers)
            .map_err(|_| unemulated)
    }
}

/// Damage to the shared state shows again at this node's own next fault, which
/// stops the VM.
fn report(served: Result<(), MemoryError>) {
    if let Err(why) = served {
        log::error!("{why}");
    }
}
