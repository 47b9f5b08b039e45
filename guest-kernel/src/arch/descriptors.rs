//! Segments, the task state and the interrupt table.
//!
//! Selectors are those of Linux, as programs may look: kernel code 0x10 and
//! data 0x18, programs' data 0x2b and code 0x33, and 0x7b, whose limit tells
//! them the processor and its node.
#![expect(unsafe_code, reason = "loads tables that the processor trusts")]

use alloc::boxed::Box;

use x86_64::instructions::segmentation::{CS, DS, ES, SS, Segment};
use x86_64::instructions::tables::load_tss;
use x86_64::registers::control::{Cr0, Cr0Flags, Cr4, Cr4Flags, Efer, EferFlags};
use x86_64::registers::model_specific::{GsBase, LStar, SFMask, Star};
use x86_64::registers::rflags::RFlags;
use x86_64::registers::xcontrol::{XCr0, XCr0Flags};
use x86_64::structures::gdt::{Descriptor, GlobalDescriptorTable, SegmentSelector};
use x86_64::structures::idt::InterruptDescriptorTable;
use x86_64::structures::tss::TaskStateSegment;
use x86_64::{PrivilegeLevel, VirtAddr};

use super::entry::{self, PerCpu};

/// The stack for double faults, which may mean that the other has run over.
const FAULT_STACK: usize = 8 << 10;

/// A processor's tables.
struct Tables {
    gdt: GlobalDescriptorTable<16>,
    idt: InterruptDescriptorTable,
    stack: [u8; FAULT_STACK],
}

/// Loads all tables of the calling processor, whose number is `cpu`, on node
/// `node`, and switches on what programs and the kernel need of it; returns the
/// components of extended state. Called once by each.
pub(super) fn load(cpu: usize, node: u32) -> u64 {
    let tables = Box::leak(Box::new(Tables {
        gdt: GlobalDescriptorTable::empty(),
        idt: InterruptDescriptorTable::new(),
        stack: [0; FAULT_STACK],
    }));
    let per_cpu: *mut PerCpu = Box::into_raw(Box::new(PerCpu::new(cpu)));
    // SAFETY: leaked for the processor, which reads the task state by this
    // address for ever; `entry` changes only its first stack.
    let tss: &'static mut TaskStateSegment = unsafe { &mut (*per_cpu).tss };
    let top = VirtAddr::from_ptr(&raw const tables.stack) + FAULT_STACK as u64;
    tss.interrupt_stack_table[0] = top;

    let gdt = &mut tables.gdt;
    // 0x08 is unused, so that the others are where Linux has them.
    gdt.append(Descriptor::UserSegment(0));
    let code = gdt.append(Descriptor::kernel_code_segment());
    let data = gdt.append(Descriptor::kernel_data_segment());
    gdt.append(Descriptor::UserSegment(0));
    let user_data = gdt.append(Descriptor::user_data_segment());
    let user_code = gdt.append(Descriptor::user_code_segment());
    gdt.append(Descriptor::UserSegment(0));
    let task = gdt.append(Descriptor::tss_segment(tss));
    while gdt.entries().len() < 15 {
        gdt.append(Descriptor::UserSegment(0));
    }
    let place = gdt.append(Descriptor::UserSegment(place(cpu, node)));
    debug_assert_eq!((code.0, data.0), (0x10, 0x18));
    debug_assert_eq!((user_data.0, user_code.0, place.0), (0x2b, 0x33, 0x7b));
    gdt.load();
    for (vector, address) in (0_u8..=255).zip(entry::stubs()) {
        set_gate(&mut tables.idt, vector, address);
    }
    tables.idt.load();
    // SAFETY: the selectors are of the table just loaded, of the right kinds.
    unsafe {
        CS::set_reg(code);
        SS::set_reg(data);
        DS::set_reg(SegmentSelector::new(0, PrivilegeLevel::Ring0));
        ES::set_reg(SegmentSelector::new(0, PrivilegeLevel::Ring0));
        load_tss(task);
    }
    GsBase::write(VirtAddr::from_ptr(per_cpu));
    features()
}

/// Data that programs may only read, of a limit that holds both numbers.
fn place(cpu: usize, node: u32) -> u64 {
    const PROGRAMS_DATA: u64 = 0xf1 << 40;
    let limit = cpu as u64 & 0xfff | (u64::from(node) & 0xff) << 12;
    PROGRAMS_DATA | limit & 0xffff | (limit >> 16) << 48
}

fn set_gate(idt: &mut InterruptDescriptorTable, vector: u8, address: VirtAddr) {
    const DOUBLE_FAULT: u8 = 8;
    const BREAKPOINT: u8 = 3;
    const OVERFLOW: u8 = 4;
    /// Gates of the architecture's own: those that the crate has types for.
    macro_rules! named {
        ($($number:literal $field:ident)*) => {
            match vector {
                // SAFETY: the stubs save all registers and return by IRETQ.
                $($number => unsafe { let _ = idt.$field.set_handler_addr(address); },)*
                // SAFETY: as above.
                32.. => unsafe { let _ = idt[vector].set_handler_addr(address); },
                _ => {}
            }
        };
    }
    named! {
        0 divide_error 1 debug 2 non_maskable_interrupt 3 breakpoint 4 overflow
        5 bound_range_exceeded 6 invalid_opcode 7 device_not_available 8 double_fault
        10 invalid_tss 11 segment_not_present 12 stack_segment_fault 13 general_protection_fault
        14 page_fault 16 x87_floating_point 17 alignment_check 18 machine_check
        19 simd_floating_point
    }
    // SAFETY: the stack is this gate's alone; the addresses are as above.
    unsafe {
        match vector {
            DOUBLE_FAULT => {
                idt.double_fault
                    .set_handler_addr(address)
                    .set_stack_index(0);
            }
            BREAKPOINT => {
                idt.breakpoint
                    .set_handler_addr(address)
                    .set_privilege_level(PrivilegeLevel::Ring3);
            }
            OVERFLOW => {
                idt.overflow
                    .set_handler_addr(address)
                    .set_privilege_level(PrivilegeLevel::Ring3);
            }
            _ => {}
        }
    }
}

/// Control registers, system calls, extended state.
fn features() -> u64 {
    let cpuid = raw_cpuid::CpuId::new();
    let extended = cpuid.get_extended_feature_info();
    let mut cr4 = Cr4Flags::PHYSICAL_ADDRESS_EXTENSION
        | Cr4Flags::OSFXSR
        | Cr4Flags::OSXMMEXCPT_ENABLE
        | Cr4Flags::OSXSAVE;
    if extended
        .as_ref()
        .is_some_and(|features| features.has_smep())
    {
        cr4 |= Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION;
    }
    // The kernel never uses a program's addresses: with this, a bug that
    // does so shows at once.
    if extended
        .as_ref()
        .is_some_and(|features| features.has_smap())
    {
        cr4 |= Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION;
    }
    let cr0 = Cr0Flags::PROTECTED_MODE_ENABLE
        | Cr0Flags::MONITOR_COPROCESSOR
        | Cr0Flags::NUMERIC_ERROR
        | Cr0Flags::WRITE_PROTECT
        | Cr0Flags::PAGING;
    let supported = cpuid
        .get_extended_state_info()
        .map_or(3, |state| u64::from(state.xcr0_supports_avx_256()) << 2 | 3);
    let components = XCr0Flags::from_bits_truncate(supported);
    // SAFETY: paging stays as it is, the kernel uses no extended state, and
    // the entry point takes system calls.
    unsafe {
        Cr0::write(cr0);
        Cr4::write(cr4);
        XCr0::write(components);
        Efer::update(|flags| {
            flags.insert(EferFlags::SYSTEM_CALL_EXTENSIONS | EferFlags::NO_EXECUTE_ENABLE);
        });
        // Programs' selectors are 8 and 16 above the first.
        Star::write_raw(0x23, 0x10);
    }
    LStar::write(entry::call_entry());
    SFMask::write(
        RFlags::INTERRUPT_FLAG
            | RFlags::TRAP_FLAG
            | RFlags::DIRECTION_FLAG
            | RFlags::ALIGNMENT_CHECK
            | RFlags::NESTED_TASK,
    );
    components.bits()
}
