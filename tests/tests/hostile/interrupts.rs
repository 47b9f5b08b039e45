//! The local APIC, its timer, and what vCPUs send each other.

use super::*;

const TPR: u32 = 0x808;
const EOI: u32 = 0x80b;
const SPURIOUS: u32 = 0x80f;
const ERROR: u32 = 0x828;
const ICR: u32 = 0x830;
const LVT_TIMER: u32 = 0x832;
const INITIAL_COUNT: u32 = 0x838;
const DIVIDE: u32 = 0x83e;
const SELF_IPI: u32 = 0x83f;
const DEADLINE: u32 = 0x6e0;
const DEADLINE_MODE: u64 = 2 << 17;
const PERIODIC_MODE: u64 = 1 << 17;

/// Waits with interrupts on until a vector's interrupts are so many.
fn wait_for(g: &mut Guest, vector: u8, count: i32) -> Assembled {
    let mut again = g.create_label();
    let mut done = g.create_label();
    g.place(&mut again)?;
    g.cli()?;
    g.cmp(at(state::INTERRUPTS + i32::from(vector) * 8), count)?;
    g.jae(done)?;
    g.sti()?;
    g.hlt()?;
    g.jmp(again)?;
    g.place(&mut done)
}

cases! {
    illegal_apic_base: Pass, |g| {
        g.read_msr(0x1b)?;
        g.mov(r12, rax)?;
        for (what, flip) in [
            ("switch off", 0x800_u64),
            ("leave x2APIC mode", 0x400),
            ("boot processor", 0x100),
            ("reserved", 1),
            ("reserved", 1 << 9),
            ("far away", 1 << 52),
        ] {
            g.faults(what, vector::GP, |g| {
                g.mov(rax, r12)?;
                g.mov(r15, flip)?;
                g.xor(rax, r15)?;
                g.mov(rdx, rax)?;
                g.shr(rdx, 32)?;
                g.mov(ecx, 0x1b)?;
                g.wrmsr()
            })?;
        }
        g.runs("as it is", |g| {
            g.mov(rax, r12)?;
            g.mov(rdx, rax)?;
            g.shr(rdx, 32)?;
            g.mov(ecx, 0x1b)?;
            g.wrmsr()
        })
    };

    illegal_apic_registers: Pass, |g| {
        for register in [0x800, 0x801, 0x804, 0x807, EOI, 0x80c, 0x80e, 0x829, 0x831, SELF_IPI,
            0x840, 0x8ff]
        {
            g.faults(&format!("RDMSR {register:#x}"), vector::GP, |g| g.read_msr(register))?;
        }
        for register in [0x800, 0x802, 0x803, 0x80a, 0x80d, 0x810, 0x817, 0x818, 0x820, 0x827,
            0x829, 0x831, 0x839, 0x840, 0x8ff]
        {
            g.faults(&format!("WRMSR {register:#x}"), vector::GP, |g| g.write_msr(register, 0))?;
        }
        Ok(())
    };

    illegal_apic_values: Pass, |g| {
        for (register, value) in [
            (TPR, 0x100),
            (TPR, 1 << 32),
            (EOI, 1),
            (ERROR, 1),
            (SPURIOUS, 1 << 32),
            (INITIAL_COUNT, 1 << 32),
            (SELF_IPI, 0x100),
            (ICR, 1 << 13),
            (ICR, 1 << 20),
            (ICR, 1 << 31),
        ] {
            g.faults(&format!("{register:#x} = {value:#x}"), vector::GP, |g| {
                g.write_msr(register, value)
            })?;
        }
        Ok(())
    };

    every_apic_register_with_garbage: Pass, |g| {
        for value in [0_u64, 0xffff_ffff, u64::MAX, 0xa5a5_a5a5] {
            for register in (0x800..0x900).filter(|register| *register != ICR) {
                g.attempt(|g| g.write_msr(register, value))?;
            }
        }
        g.attempt(|g| g.write_msr(SPURIOUS, 0xff))
    };

    garbage_in_the_command_register: Pass, |g| {
        g.enable_apic()?;
        // All modes but INIT and start-up, all shorthands, wild destinations.
        for mode in [0_u64, 1, 2, 3, 4, 7] {
            for shorthand in 0..4 {
                for destination in [0, 1, 0xff, 0x1_0000, 0xffff_ffff, 0x7fff_0001] {
                    for vector in [0_u64, 15, 16, 255] {
                        // No interrupt arrives: they are off.
                        let low = mode << 8 | shorthand << 18 | vector | 1 << 11;
                        g.attempt(|g| g.write_msr(ICR, destination << 32 | low))?;
                    }
                }
            }
        }
        Ok(())
    };

    illegal_vectors_are_not_sent: Pass, |g| {
        g.enable_apic()?;
        g.sti()?;
        for vector in 0..16 {
            g.attempt(|g| g.write_msr(ICR, vector))?;
            g.attempt(|g| g.write_msr(SELF_IPI, vector))?;
            g.cpuid()?;
        }
        g.cli()?;
        g.mov(rax, at(state::COUNT))?;
        g.require_rax("no exception by interrupt", 0)?;
        g.attempt(|g| g.write_msr(ERROR, 0))?;
        g.read_msr(ERROR)?;
        g.and(eax, 0x20)?;
        g.require_rax("the error is noted", 0x20)
    };

    start_up_and_reset_of_nobody: Pass, |g| {
        for destination in [1_u64, 2, 0xfe, 0x100, 0xffff, 0x8000_0000] {
            for low in [0x4500, 0x8500, 0x0500, 0x4600, 0x46ff, 0x0600] {
                g.runs("sent", |g| g.write_msr(ICR, destination << 32 | low))?;
            }
        }
        g.runs("all but self", |g| g.write_msr(ICR, 0xc4500))?;
        g.runs("all but self", |g| g.write_msr(ICR, 0xc46ff))
    };

    start_up_of_a_running_vcpu: Pass, |g| {
        for page in [0_u64, 1, 0x20, 0xff] {
            g.runs("to itself", |g| g.write_msr(ICR, 0x4600 | page))?;
        }
        Ok(())
    };

    reset_of_itself: Stay, |g| {
        g.say("READY")?;
        g.write_msr(ICR, 0x4500)?;
        g.say("it goes on")
    };

    start_up_into_zeros: PassOrCrash[2], |g| {
        // The second vCPU executes whatever is there, but not the reset vector.
        g.write_msr(ICR, 1 << 32 | 0x4500)?;
        g.write_msr(ICR, 1 << 32 | 0x4680)?;
        g.repeat(1000, |g| g.in_(al, 0x80))
    };

    start_up_again_and_again: Pass[2], |g| {
        g.second_vcpu(|code| {
            let mut again = code.create_label();
            code.set_label(&mut again)?;
            code.hlt()?;
            code.jmp(again)
        })?;
        g.repeat(200, |g| {
            g.mov(r12, rbx)?;
            g.start_second_vcpu()?;
            g.mov(rbx, r12)
        })?;
        g.let_second_vcpu_end_it()?;
        g.cli()?;
        g.hlt()
    };

    self_interrupt_storm: Pass, |g| {
        g.enable_apic()?;
        g.sti()?;
        g.repeat(20_000, |g| g.write_msr(SELF_IPI, 0x40))?;
        g.cli()?;
        g.mov(rax, at(state::INTERRUPTS + 0x40 * 8))?;
        g.require_rax("all come", 20_000)
    };

    all_vectors_at_once: Pass, |g| {
        g.enable_apic()?;
        g.cli()?;
        for vector in 32..=255_u8 {
            g.write_msr(SELF_IPI, vector.into())?;
        }
        g.sti()?;
        g.nop()?;
        g.cpuid()?;
        g.cli()?;
        for vector in 32..=255_u8 {
            g.require_interrupts(&format!("vector {vector}"), vector, 1)?;
        }
        Ok(())
    };

    software_interrupts_in_the_storm: Pass, |g| {
        g.enable_apic()?;
        g.sti()?;
        g.repeat(5_000, |g| {
            g.write_msr(SELF_IPI, 0x40)?;
            g.int(0x60)?;
            g.write_msr(ICR, 0x4_0041)?;
            g.int(0x60)
        })?;
        g.cli()?;
        g.mov(rax, at(state::INTERRUPTS + 0x60 * 8))?;
        g.require_rax("software interrupts", 10_000)?;
        g.require_interrupts("hardware interrupts", 0x40, 5_000)?;
        g.require_interrupts("hardware interrupts", 0x41, 5_000)
    };

    interrupts_wait_for_the_window: Pass, |g| {
        g.enable_apic()?;
        g.cli()?;
        g.repeat(1_000, |g| {
            g.write_msr(SELF_IPI, 0x40)?;
            g.mov(rax, at(state::INTERRUPTS + 0x40 * 8))?;
            g.mov(r12, rax)?;
            g.cpuid_keeping_rbx()?;
            g.mov(rax, at(state::INTERRUPTS + 0x40 * 8))?;
            g.require("none while off", |g, ok| {
                g.cmp(rax, r12)?;
                g.je(ok)
            })?;
            g.sti()?;
            g.nop()?;
            g.cli()?;
            g.mov(rax, at(state::INTERRUPTS + 0x40 * 8))?;
            g.require("one when on", |g, ok| {
                g.dec(rax)?;
                g.cmp(rax, r12)?;
                g.je(ok)
            })
        })
    };

    task_priority_holds_interrupts_back: Pass, |g| {
        g.enable_apic()?;
        g.mov(eax, 15)?;
        g.mov(cr8, rax)?;
        g.sti()?;
        g.write_msr(SELF_IPI, 0x40)?;
        g.cpuid()?;
        g.mov(rax, at(state::INTERRUPTS + 0x40 * 8))?;
        g.require_rax("held back", 0)?;
        g.xor(eax, eax)?;
        g.mov(cr8, rax)?;
        g.nop()?;
        g.cpuid()?;
        g.require_interrupts("let through", 0x40, 1)
    };

    task_priority_lets_through_without_an_exit: Pass, |g| {
        g.enable_apic()?;
        g.mov(eax, 15)?;
        g.mov(cr8, rax)?;
        g.sti()?;
        g.write_msr(SELF_IPI, 0x40)?;
        g.xor(eax, eax)?;
        g.mov(cr8, rax)?;
        g.nop()?;
        g.require_interrupts("let through", 0x40, 1)
    };

    task_priority_of_the_same_class_holds_back: Pass, |g| {
        g.enable_apic()?;
        g.mov(eax, 4)?;
        g.mov(cr8, rax)?;
        g.sti()?;
        g.write_msr(SELF_IPI, 0x40)?;
        g.cpuid()?;
        g.mov(rax, at(state::INTERRUPTS + 0x40 * 8))?;
        g.require_rax("held back", 0)?;
        g.xor(eax, eax)?;
        g.mov(cr8, rax)?;
        g.cpuid()?;
        g.require_interrupts("let through", 0x40, 1)
    };

    task_priority_set_while_interrupts_are_off: Pass, |g| {
        g.enable_apic()?;
        g.cli()?;
        g.write_msr(SELF_IPI, 0x40)?;
        for priority in [0, 5, 15, 0] {
            g.mov(eax, priority)?;
            g.mov(cr8, rax)?;
        }
        g.mov(eax, 16)?;
        g.faults("a priority that isn't one", vector::GP, |g| g.mov(cr8, rax))?;
        g.sti()?;
        g.nop()?;
        g.cpuid()?;
        g.require_interrupts("delivered", 0x40, 1)
    };

    ends_of_no_interrupt: Pass, |g| {
        g.enable_apic()?;
        g.repeat(1_000, |g| g.runs("EOI", |g| g.write_msr(EOI, 0)))
    };

    deadline_in_the_past: Pass, |g| {
        g.enable_apic()?;
        g.write_msr(LVT_TIMER, DEADLINE_MODE | 0x50)?;
        for (deadline, count) in [(1, 1), (2, 2), (1, 3)] {
            g.write_msr(DEADLINE, deadline)?;
            wait_for(g, 0x50, count)?;
        }
        g.read_msr(DEADLINE)?;
        g.require_rax("disarmed", 0)
    };

    deadline_in_the_past_comes_at_once: Pass, |g| {
        g.enable_apic()?;
        g.write_msr(LVT_TIMER, DEADLINE_MODE | 0x50)?;
        g.sti()?;
        g.write_msr(DEADLINE, 1)?;
        g.cli()?;
        g.require_interrupts("before the next instruction", 0x50, 1)
    };

    // Whoever lets an interrupt in between STI and HLT sleeps for ever.
    deadlines_around_the_halt: Pass, |g| {
        g.enable_apic()?;
        g.write_msr(LVT_TIMER, DEADLINE_MODE | 0x50)?;
        g.mov(r12, 0_u64)?;
        g.repeat(2_000, |g| {
            let mut again = g.create_label();
            let mut done = g.create_label();
            g.inc(r12)?;
            g.write_msr(DEADLINE, 1)?;
            g.place(&mut again)?;
            g.cli()?;
            g.cmp(r12, at(state::INTERRUPTS + 0x50 * 8))?;
            g.jbe(done)?;
            g.sti()?;
            g.hlt()?;
            g.jmp(again)?;
            g.place(&mut done)
        })
    };

    // An interrupt of the host's timer that is lost between two exits would
    // leave a guest without exits alone for ever.
    deadlines_among_exits: Pass, |g| {
        g.enable_apic()?;
        g.write_msr(LVT_TIMER, DEADLINE_MODE | 0x50)?;
        g.sti()?;
        g.mov(r12, 0_u64)?;
        g.repeat(1_000, |g| {
            let mut exits = g.create_label();
            let mut waits = g.create_label();
            g.inc(r12)?;
            // From 10 to some 70 thousand ticks ahead, by chance.
            g.rdtsc()?;
            g.shl(rdx, 32)?;
            g.or(rax, rdx)?;
            g.imul_3(rdx, rax, 0x6b43)?;
            g.and(edx, 0xffff)?;
            g.lea(rax, rax + rdx + 10_000)?;
            g.mov(rdx, rax)?;
            g.shr(rdx, 32)?;
            g.mov(ecx, DEADLINE)?;
            g.wrmsr()?;
            g.mov(r15, 60_u64)?;
            g.mov(r14, rbx)?;
            g.place(&mut exits)?;
            g.xor(eax, eax)?;
            g.cpuid()?;
            g.dec(r15)?;
            g.jnz(exits)?;
            g.mov(rbx, r14)?;
            g.place(&mut waits)?;
            g.cmp(r12, at(state::INTERRUPTS + 0x50 * 8))?;
            g.ja(waits)
        })
    };

    deadline_at_the_end_of_time: Pass, |g| {
        g.enable_apic()?;
        g.write_msr(LVT_TIMER, DEADLINE_MODE | 0x50)?;
        for deadline in [u64::MAX, 1 << 63, 1 << 62] {
            g.write_msr(DEADLINE, deadline)?;
            g.sti()?;
            g.repeat(100, |g| g.in_(al, 0x80))?;
            g.cli()?;
            g.mov(rax, at(state::INTERRUPTS + 0x50 * 8))?;
            g.require_rax("not yet", 0)?;
            g.read_msr(DEADLINE)?;
            g.require_rax("armed", deadline)?;
        }
        g.write_msr(DEADLINE, 1)?;
        wait_for(g, 0x50, 1)
    };

    deadline_in_another_mode: Pass, |g| {
        g.enable_apic()?;
        g.write_msr(LVT_TIMER, 0x50)?;
        g.write_msr(DEADLINE, 1)?;
        g.sti()?;
        g.cpuid()?;
        g.cli()?;
        g.mov(rax, at(state::INTERRUPTS + 0x50 * 8))?;
        g.require_rax("no effect", 0)
    };

    timer_with_illegal_vectors: Pass, |g| {
        g.enable_apic()?;
        g.sti()?;
        for vector in 0..16 {
            g.write_msr(LVT_TIMER, DEADLINE_MODE | vector)?;
            g.write_msr(DEADLINE, 1)?;
            g.cpuid()?;
            g.write_msr(LVT_TIMER, vector)?;
            g.write_msr(INITIAL_COUNT, 1)?;
            g.cpuid()?;
        }
        g.cli()?;
        g.mov(rax, at(state::COUNT))?;
        g.require_rax("no exception by interrupt", 0)
    };

    periodic_timer: Pass, |g| {
        g.enable_apic()?;
        g.write_msr(DIVIDE, 0b1011)?;
        g.write_msr(LVT_TIMER, PERIODIC_MODE | 0x51)?;
        g.write_msr(INITIAL_COUNT, 5_000_000)?;
        wait_for(g, 0x51, 5)?;
        g.write_msr(INITIAL_COUNT, 0)
    };

    fastest_periodic_timer: Pass[2], |g| {
        g.let_second_vcpu_end_it()?;
        g.enable_apic()?;
        g.write_msr(DIVIDE, 0b1011)?;
        g.write_msr(LVT_TIMER, PERIODIC_MODE | 0x51)?;
        g.write_msr(INITIAL_COUNT, 1)?;
        wait_for(g, 0x51, i32::MAX)
    };

    timer_of_all_divisors_and_counts: Pass, |g| {
        g.enable_apic()?;
        for divide in [0_u64, 1, 2, 3, 8, 9, 10, 11, 0xffff_ffff] {
            for mode in [0, PERIODIC_MODE, DEADLINE_MODE, 3 << 17] {
                g.write_msr(LVT_TIMER, mode | 0x52 | 1 << 16)?;
                g.attempt(|g| g.write_msr(DIVIDE, divide))?;
                for count in [0, 1, 0x7fff_ffff, 0xffff_ffff] {
                    g.write_msr(INITIAL_COUNT, count)?;
                    g.read_msr(0x839)?;
                }
            }
        }
        Ok(())
    };

    interrupts_of_a_disabled_apic: Pass, |g| {
        g.write_msr(SPURIOUS, 0xff)?;
        g.sti()?;
        g.runs("sent", |g| g.write_msr(SELF_IPI, 0x40))?;
        g.cpuid()?;
        g.cli()?;
        g.mov(rax, at(state::INTERRUPTS + 0x40 * 8))?;
        g.require_rax("not taken", 0)
    };

    halt_in_the_shadow: Pass, |g| {
        g.enable_apic()?;
        g.repeat(1_000, |g| {
            g.cli()?;
            g.write_msr(SELF_IPI, 0x40)?;
            g.sti()?;
            g.hlt()
        })?;
        g.cli()?;
        g.mov(rax, at(state::INTERRUPTS + 0x40 * 8))?;
        g.require_rax("each wakes", 1_000)
    };

    exit_in_the_shadow: Pass, |g| {
        g.enable_apic()?;
        g.repeat(1_000, |g| {
            g.mov(r12, rbx)?;
            g.cli()?;
            g.write_msr(SELF_IPI, 0x40)?;
            g.sti()?;
            g.cpuid()?;
            g.nop()?;
            g.mov(rbx, r12)
        })?;
        g.cli()?;
        g.mov(rax, at(state::INTERRUPTS + 0x40 * 8))?;
        g.require_rax("all come", 1_000)
    };
}
