//! KVM's paravirtual interface with wrong addresses and arguments.

use super::*;

const WALL_CLOCK: u32 = 0x4b56_4d00;
const SYSTEM_TIME: u32 = 0x4b56_4d01;
const STEAL_TIME: u32 = 0x4b56_4d03;
const END_OF_INTERRUPT: u32 = 0x4b56_4d04;
const KICK: u64 = 5;
const SEND: u64 = 10;

/// Addresses, switched on, where no such page can be.
const WRONG: [u64; 12] = [
    0x0800_0001,
    0x07ff_fffd,
    0x07ff_ffff,
    0xd000_0001,
    0xe000_0001,
    0xfec0_0001,
    0x40_0000_0001,
    0x100_0000_0001,
    1 << 52 | 1,
    1 << 63 | 1,
    u64::MAX,
    u64::MAX - 63,
];

/// Arguments of the hypercall that sends interrupts.
fn send(g: &mut Guest, set: [u64; 2], first: u64, command: u64) -> Assembled {
    g.mov(rbx, set[0])?;
    g.mov(rcx, set[1])?;
    g.mov(rdx, first)?;
    g.mov(rsi, command)?;
    g.hypercall(SEND)
}

fn try_wrong_addresses(g: &mut Guest, msr: u32) -> Assembled {
    g.enable_apic()?;
    for address in WRONG {
        g.attempt(|g| g.write_msr(msr, address))?;
        // Exits, interrupts and their ends use it.
        g.sti()?;
        g.write_msr(0x83f, 0x40)?;
        g.cpuid()?;
        g.cli()?;
    }
    let count = u64::try_from(WRONG.len()).expect("a small number");
    g.mov(rax, at(state::INTERRUPTS + 0x40 * 8))?;
    g.require_rax("interrupts come all the same", count)?;
    g.runs("switched off", |g| g.write_msr(msr, 0))
}

cases! {
    wall_clock_in_wrong_places: Pass, |g| try_wrong_addresses(g, WALL_CLOCK);
    system_time_in_wrong_places: Pass, |g| try_wrong_addresses(g, SYSTEM_TIME);
    steal_time_in_wrong_places: Pass, |g| try_wrong_addresses(g, STEAL_TIME);
    end_of_interrupt_in_wrong_places: Pass, |g| try_wrong_addresses(g, END_OF_INTERRUPT);
    old_clock_registers_in_wrong_places: Pass, |g| {
        try_wrong_addresses(g, 0x11)?;
        try_wrong_addresses_again(g, 0x12)
    };

    pages_where_they_belong: Pass, |g| {
        g.runs("system time", |g| g.write_msr(SYSTEM_TIME, SCRATCH | 1))?;
        g.load(SCRATCH + 24)?;
        g.require("a multiplier", |g, ok| {
            g.test(eax, eax)?;
            g.jnz(ok)
        })?;
        g.runs("wall clock", |g| g.write_msr(WALL_CLOCK, SCRATCH + 0x100))?;
        g.load(SCRATCH + 0x104)?;
        g.require("after 2020", |g, ok| {
            g.cmp(eax, 1_577_836_800)?;
            g.ja(ok)
        })?;
        g.read_msr(SYSTEM_TIME)?;
        g.require_rax("it reads back", SCRATCH | 1)
    };

    steal_time_with_reserved_bits: Pass, |g| {
        for bit in 1..6 {
            g.faults("misaligned", vector::GP, |g| {
                g.write_msr(STEAL_TIME, SCRATCH | 1 << bit | 1)
            })?;
            g.faults("off and misaligned", vector::GP, |g| g.write_msr(STEAL_TIME, 1 << bit))?;
        }
        g.read_msr(STEAL_TIME)?;
        g.require_rax("as it was", 0)
    };

    steal_time_page_full_of_garbage: Pass, |g| {
        g.store(SCRATCH, 700)?;
        g.store(SCRATCH + 8, u32::MAX)?;
        g.store(SCRATCH + 16, u32::MAX)?;
        g.runs("switched on", |g| g.write_msr(STEAL_TIME, SCRATCH | 1))?;
        g.load(SCRATCH + 8)?;
        g.require("an even version", |g, ok| {
            g.test(eax, 1)?;
            g.jz(ok)
        })?;
        g.load(SCRATCH)?;
        g.require_rax("the sum goes on", 700)?;
        g.load(SCRATCH + 16)?;
        g.require_rax("it has its core", 0xffff_ff00)?;
        g.read_msr(STEAL_TIME)?;
        g.require_rax("it reads back", SCRATCH | 1)
    };

    end_of_interrupt_by_memory: Pass, |g| {
        g.enable_apic()?;
        g.write_msr(END_OF_INTERRUPT, SCRATCH | 1)?;
        g.sti()?;
        g.repeat(1_000, |g| g.write_msr(0x83f, 0x40))?;
        g.cli()?;
        g.mov(rax, at(state::INTERRUPTS + 0x40 * 8))?;
        g.require_rax("all come", 1_000)
    };

    end_of_interrupt_word_full_of_garbage: Pass, |g| {
        g.enable_apic()?;
        g.write_msr(END_OF_INTERRUPT, SCRATCH | 1)?;
        g.sti()?;
        for garbage in [0_u32, 1, 2, u32::MAX, 0x8000_0000] {
            g.write_msr(0x83f, 0x40)?;
            g.store(SCRATCH, garbage)?;
            g.cpuid()?;
        }
        g.cli()?;
        g.require_interrupts("they come", 0x40, 5)
    };

    interrupts_to_wild_sets: Pass, |g| {
        g.enable_apic()?;
        for set in [[0, 0], [u64::MAX, u64::MAX], [1 << 63, 1 << 63]] {
            for first in [1, 64, 127, 128, 0xffff_ffff, 1 << 63, u64::MAX, u64::MAX - 127] {
                send(g, set, first, 0x40)?;
                g.require("nobody", |g, ok| {
                    g.test(rax, rax)?;
                    g.jz(ok)
                })?;
            }
        }
        send(g, [1, 0], 0, 0x40)?;
        g.require_rax("itself", 1)?;
        g.sti()?;
        g.nop()?;
        g.cpuid()?;
        g.cli()?;
        g.mov(rax, at(state::INTERRUPTS + 0x40 * 8))?;
        g.require_rax("it comes", 1)
    };

    interrupts_of_wild_kinds: Pass, |g| {
        g.enable_apic()?;
        g.sti()?;
        for command in [0, 1, 15, 0x100, 0x240, 0x540, 0x640, 0x740, u64::MAX] {
            send(g, [u64::MAX, u64::MAX], 0, command)?;
            g.cpuid()?;
        }
        g.cli()?;
        g.mov(rax, at(state::COUNT))?;
        g.require_rax("no exception by interrupt", 0)
    };

    nmis_to_sets: Pass, |g| {
        const NMI: u64 = 0x400;
        g.enable_apic()?;
        g.mov(at(state::RECOVERY), 1)?;
        send(g, [1, 0], 0, NMI)?;
        g.require_rax("itself", 1)?;
        g.nop()?;
        g.cpuid()?;
        // The vector's bits mean nothing.
        send(g, [1, 0], 0, NMI | 0x40)?;
        g.nop()?;
        g.cpuid()?;
        send(g, [1 << 63, 0], 0, NMI)?;
        g.require_rax("nobody", 0)?;
        g.mov(at(state::RECOVERY), 0)?;
        g.mov(rax, at(state::COUNT))?;
        g.require_rax("both come", 2)?;
        g.mov(rax, at(state::VECTOR))?;
        g.require_rax("by the vector of NMIs", 2)
    };

    kicks_of_nobody: Pass, |g| {
        for target in [1_u64, 254, 255, 256, 0xffff_ffff, u64::MAX] {
            g.mov(rbx, target)?;
            g.mov(rcx, target)?;
            g.hypercall(KICK)?;
        }
        Ok(())
    };
}

fn try_wrong_addresses_again(g: &mut Guest, msr: u32) -> Assembled {
    g.mov(at(state::INTERRUPTS + 0x40 * 8), 0)?;
    try_wrong_addresses(g, msr)
}
