//! Accesses to guest physical addresses that are not RAM.

use vmm_shared::addr::{Gpa, Gva};
use vmm_shared::control::Counter;

use super::Vcpu;
use super::decode::{self, MmioAccess};
use super::exit::{Exception, Outcome, StopReason};
use crate::mem::walk::{self, Privilege, WalkError};
use crate::vm::Vm;

const FAULT_FETCH: u64 = 1 << 4;
const FAULT_TABLE_WALK: u64 = 1 << 33;

impl Vcpu {
    /// A device register, or nothing at all: reads of nothing give ones,
    /// writes to it are dropped, both are counted.
    pub(super) fn nested_fault(&mut self, gpa: Gpa, error: u64, vm: &Vm) -> Outcome {
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
        let mut loaded = 0;
        if access.reads() {
            loaded = vm.mmio_read(gpa, access.width).unwrap_or_else(|| {
                vm.count(self.id, Counter::UnknownAddress);
                access.width.mask()
            });
        }
        if let Some(value) = access.complete(&mut self.registers, loaded)
            && vm.mmio_write(gpa, access.width, value).is_none()
        {
            vm.count(self.id, Counter::UnknownAddress);
        }
        self.advance(access.len);
        Outcome::Resume
    }

    fn decode_access(&self, vm: &Vm) -> Result<MmioAccess, impl FnOnce(Gpa) -> Outcome + use<>> {
        let rip = self.registers.rip;
        let unemulated = move |gpa| Outcome::Stop(StopReason::Unemulated { rip, gpa });
        let paging = self.vmcb.paging(&self.registers);
        let privilege = if self.vmcb.cpl() == 3 {
            Privilege::User
        } else {
            Privilege::Supervisor
        };
        let linear = Gva(self.vmcb.linear_rip(&self.registers));
        let fetched: Result<_, WalkError> = walk::fetch(&vm.memory, &paging, privilege, linear);
        let bytes = fetched.map_err(|_| unemulated)?;
        decode::decode(bytes.as_bytes(), rip, self.vmcb.bitness(), &self.registers)
            .map_err(|_| unemulated)
    }
}
