//! INS and OUTS: a port's data in guest memory.
//!
//! Each element is moved whole or not at all: the memory is translated before
//! the port is touched, so that a page fault leaves the device as it was. A
//! repeated one stays at its instruction until RCX is 0, with the registers
//! as far as it has come. Manual: vol. 3, INS and OUTS.

use vmm_shared::addr::{Gpa, Gva};
use vmm_shared::control::Counter;

use super::Vcpu;
use super::decode::{self, Bitness, StringPort};
use super::exit::{Direction, Exception, Outcome, PortAccess};
use super::registers::Gpr;
use crate::devices::Width;
use crate::fabric::forward::{Access, Request, Space};
use crate::mem::GuestMemory;
use crate::mem::walk::{self, AccessKind, WalkError};
use crate::vm::Vm;

/// Elements that are moved in one exit; interrupts wait for so long.
const AT_ONCE: u64 = 64;
const DIRECTION_FLAG: u64 = 1 << 10;
const PAGE_FAULT: u8 = 14;

/// Where the bytes of one element are: it may lie on two pages.
type Places = [Gpa; 4];

impl Vcpu {
    /// Moves what an INS or OUTS asks for.
    pub(super) fn string_port(&mut self, port: &PortAccess, width: Width, vm: &Vm) -> Outcome {
        let code = self.fetch(vm);
        let code = code.as_ref().map_or(&[][..], |code| code.as_bytes());
        let Some(string) = decode::string_port(code, self.vmcb.bitness()) else {
            vm.count(self.id, Counter::UnknownPort);
            return Outcome::Inject(Exception::GP);
        };
        for _ in 0..AT_ONCE {
            if string.repeats && self.registers.get(Gpr::Rcx) & string.mask == 0 {
                break;
            }
            let places = match self.places(port.direction, width, &string, vm) {
                Ok(places) => places,
                Err(exception) => return Outcome::Inject(exception),
            };
            let request = match self.move_element(port, width, &places, vm) {
                Ok(request) => request,
                Err(exception) => return Outcome::Inject(exception),
            };
            self.count_element(port.direction, width, &string);
            match request {
                Request::Stop(reason) => return Outcome::Stop(reason),
                Request::Unknown => vm.count(self.id, Counter::UnknownPort),
                Request::None => {}
            }
            if !string.repeats {
                break;
            }
        }
        if !string.repeats || self.registers.get(Gpr::Rcx) & string.mask == 0 {
            self.advance_to(port.next_rip);
        }
        Outcome::Resume
    }

    /// The register that points to the memory.
    const fn pointer(direction: Direction) -> Gpr {
        match direction {
            Direction::In => Gpr::Rdi,
            Direction::Out => Gpr::Rsi,
        }
    }

    /// Translates where the next element is.
    fn places(
        &mut self,
        direction: Direction,
        width: Width,
        string: &StringPort,
        vm: &Vm,
    ) -> Result<Places, Exception> {
        let segment = self.vmcb.segment(string.segment);
        let offset = self.registers.get(Self::pointer(direction)) & string.mask;
        let last = width.bytes() as u64 - 1;
        let base = match self.vmcb.bitness() {
            Bitness::Bits64 => 0,
            _ if offset.saturating_add(last) > segment.limit.into() => {
                return Err(Exception::GP);
            }
            _ => segment.base,
        };
        let access = walk::Access {
            kind: match direction {
                Direction::In => AccessKind::Write,
                Direction::Out => AccessKind::Read,
            },
            privilege: self.privilege(),
        };
        let paging = self.vmcb.paging(&self.registers);
        let mut places = [Gpa(0); 4];
        for (at, place) in (0..=last).zip(&mut places) {
            let address = Gva(base.wrapping_add(offset).wrapping_add(at));
            *place = walk::translate(&vm.memory, &paging, address, access)
                .map_err(|why| self.exception(why))?;
        }
        Ok(places)
    }

    fn exception(&mut self, why: WalkError) -> Exception {
        match why {
            WalkError::PageFault {
                gva, error_code, ..
            } => {
                self.vmcb.save.cr2 = gva.0;
                Exception {
                    vector: PAGE_FAULT,
                    error: Some(error_code),
                }
            }
            WalkError::NonCanonical { .. } | WalkError::OutsideMemory { .. } => Exception::GP,
        }
    }

    fn move_element(
        &self,
        port: &PortAccess,
        width: Width,
        places: &Places,
        vm: &Vm,
    ) -> Result<Request, Exception> {
        // Memory without RAM has no element, and takes none.
        let mut bytes = [0; 8];
        for (byte, place) in bytes.iter_mut().zip(places).take(width.bytes()) {
            vm.memory
                .read_bytes(*place, core::slice::from_mut(byte))
                .map_err(|_| Exception::GP)?;
        }
        let access = Access {
            space: Space::Ports,
            direction: port.direction,
            width,
            address: port.port.into(),
            value: match port.direction {
                Direction::In => 0,
                Direction::Out => u64::from_le_bytes(bytes),
            },
        };
        let (value, request) = vm.access(self.id, &access);
        if port.direction == Direction::In {
            let value = value.to_le_bytes();
            for (byte, place) in value.iter().zip(places).take(width.bytes()) {
                vm.memory
                    .write_bytes(*place, core::slice::from_ref(byte))
                    .map_err(|_| Exception::GP)?;
            }
        }
        Ok(request)
    }

    /// Moves the registers on by one element.
    fn count_element(&mut self, direction: Direction, width: Width, string: &StringPort) {
        let bytes = width.bytes() as u64;
        let step = match self.registers.rflags & DIRECTION_FLAG {
            0 => bytes,
            _ => bytes.wrapping_neg(),
        };
        let mut add = |register, step: u64| {
            let old = self.registers.get(register);
            let sum = old.wrapping_add(step) & string.mask;
            // A 32-bit register's upper half is cleared, a 16-bit one's rest kept.
            let kept = match string.mask {
                0xffff => old & !string.mask,
                _ => 0,
            };
            self.registers.set(register, kept | sum);
        };
        add(Self::pointer(direction), step);
        if string.repeats {
            add(Gpr::Rcx, u64::MAX);
        }
    }
}
