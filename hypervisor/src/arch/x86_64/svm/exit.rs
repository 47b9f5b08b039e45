//! Why the guest exited: the VMCB's exit fields as one enum.
//!
//! Codes: AMD64 manual vol. 2, appendix C.

use vmm_shared::addr::Gpa;

use super::vmcb::Control;
use crate::vcpu::exit::{Direction, Exit, PortAccess};

const EXCEPTION_BASE: u64 = 0x40;

/// Reads the exit out of the control area.
#[must_use]
pub fn decode(control: &Control) -> Exit {
    match control.exit_code {
        0x18 => Exit::WriteCr8,
        0x27 => Exit::DebugControl(Direction::In),
        0x37 => Exit::DebugControl(Direction::Out),
        code @ 0x40..=0x5f => Exit::Exception {
            vector: u8::try_from(code - EXCEPTION_BASE).expect("32 codes"),
            error: low_half(control.exit_info_1),
        },
        0x60..=0x63 => Exit::HostInterrupt,
        0x6f => Exit::Rdpmc,
        0x72 => Exit::Cpuid,
        0x74 => Exit::Iret,
        0x76 => Exit::CacheInstruction,
        0x78 => Exit::Halt,
        0x7b => Exit::Port(port_access(control)),
        0x7c => match control.exit_info_1 & 1 {
            0 => Exit::ReadMsr,
            _ => Exit::WriteMsr,
        },
        0x7f => Exit::Shutdown,
        0x81 => Exit::Hypercall,
        // RSM, INVLPGA, VMRUN, VMLOAD, VMSAVE, STGI, CLGI, SKINIT, MONITOR,
        // MWAIT, RDPRU: not in the guest's CPUID, so undefined.
        0x73 | 0x7a | 0x80 | 0x82..=0x86 | 0x8a..=0x8c | 0x8e => Exit::Undefined,
        0x89 => Exit::CacheInstruction,
        0x8d => Exit::Xsetbv,
        0x400 => Exit::NestedFault {
            gpa: Gpa(control.exit_info_2),
            error: control.exit_info_1,
        },
        // -1, stored by old emulators as 32 bits.
        0xffff_ffff | u64::MAX => Exit::InvalidState,
        code => Exit::Other { code },
    }
}

fn low_half(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).expect("masked")
}

/// Manual: vol. 2, 15.10.2.
fn port_access(control: &Control) -> PortAccess {
    let info = control.exit_info_1;
    PortAccess {
        port: u16::try_from(info >> 16 & 0xffff).expect("masked"),
        direction: if info & 1 == 0 {
            Direction::Out
        } else {
            Direction::In
        },
        width: u8::try_from(info >> 4 & 7).expect("masked"),
        string: info & 1 << 2 != 0,
        next_rip: control.exit_info_2,
    }
}
