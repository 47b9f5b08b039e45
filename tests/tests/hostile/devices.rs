//! Ports and device registers, all of them and any value.

use super::*;

const IOAPIC_SELECT: u64 = 0xfec0_0000;
const IOAPIC_DATA: u64 = 0xfec0_0010;
const VIRTIO: u64 = 0xd000_0000;

/// virtio-mmio registers.
mod virtio {
    pub(super) const FEATURES: u64 = 0x20;
    pub(super) const FEATURES_SELECT: u64 = 0x24;
    pub(super) const QUEUE_SELECT: u64 = 0x30;
    pub(super) const QUEUE_SIZE: u64 = 0x38;
    pub(super) const QUEUE_READY: u64 = 0x44;
    pub(super) const NOTIFY: u64 = 0x50;
    pub(super) const STATUS: u64 = 0x70;
    pub(super) const DESCRIPTORS: u64 = 0x80;
    pub(super) const DRIVER: u64 = 0x90;
    pub(super) const DEVICE: u64 = 0xa0;
}

const DESCRIPTOR_TABLE: u64 = SCRATCH;
const AVAILABLE: u64 = SCRATCH + 0x1000;
const USED: u64 = SCRATCH + 0x2000;

fn set(g: &mut Guest, register: u64, value: u32) -> Assembled {
    g.store(VIRTIO + register, value)
}

fn set_address(g: &mut Guest, register: u64, address: u64) -> Assembled {
    let [a, b, c, d, e, f, h, i] = address.to_le_bytes();
    set(g, register, u32::from_le_bytes([a, b, c, d]))?;
    set(g, register + 4, u32::from_le_bytes([e, f, h, i]))
}

/// Takes the device up to the features.
fn negotiate(g: &mut Guest) -> Assembled {
    set(g, virtio::STATUS, 0)?;
    set(g, virtio::STATUS, 3)?;
    // VIRTIO_F_VERSION_1.
    set(g, virtio::FEATURES_SELECT, 1)?;
    set(g, virtio::FEATURES, 1)?;
    set(g, virtio::STATUS, 11)
}

fn set_queue(g: &mut Guest, queue: u32, size: u32, places: [u64; 3]) -> Assembled {
    set(g, virtio::QUEUE_SELECT, queue)?;
    set(g, virtio::QUEUE_SIZE, size)?;
    set_address(g, virtio::DESCRIPTORS, places[0])?;
    set_address(g, virtio::DRIVER, places[1])?;
    set_address(g, virtio::DEVICE, places[2])?;
    set(g, virtio::QUEUE_READY, 1)
}

/// A descriptor: address, length, flags, next.
fn describe(g: &mut Guest, index: u64, address: u64, len: u32, flags: u32, next: u32) -> Assembled {
    let at = DESCRIPTOR_TABLE + index * 16;
    g.mov(rdi, at)?;
    g.mov(rax, address)?;
    g.mov(qword_ptr(rdi), rax)?;
    g.store(at + 8, len)?;
    g.store(at + 12, flags | next << 16)
}

/// Offers these descriptors on both queues, and kicks.
fn kick(g: &mut Guest, index: u32, heads: &[u32]) -> Assembled {
    for (head, slot) in heads.iter().zip(0..) {
        g.mov(rdi, AVAILABLE + 4 + slot * 2)?;
        g.mov(word_ptr(rdi), *head)?;
    }
    g.store(AVAILABLE, index << 16)?;
    for queue in 0..6 {
        set(g, virtio::NOTIFY, queue)?;
    }
    Ok(())
}

/// Both queues of the first port with one chain, then everything afresh.
fn try_chain(g: &mut Guest, chain: impl FnOnce(&mut Guest) -> Assembled) -> Assembled {
    negotiate(g)?;
    chain(g)?;
    for queue in 0..4 {
        set_queue(g, queue, 8, [DESCRIPTOR_TABLE, AVAILABLE, USED])?;
    }
    set(g, virtio::STATUS, 15)?;
    kick(g, 1, &[0])?;
    kick(g, 2, &[0, 0])?;
    set(g, virtio::STATUS, 0)
}

fn in_all_ports(g: &mut Guest, read: impl FnOnce(&mut Guest) -> Assembled) -> Assembled {
    g.xor(edx, edx)?;
    g.repeat(0x1_0000, |g| {
        read(g)?;
        g.inc(edx)
    })
}

/// All ports but the serial port's eight.
fn out_all_ports(g: &mut Guest, write: impl FnOnce(&mut Guest) -> Assembled) -> Assembled {
    g.xor(edx, edx)?;
    g.repeat(0x1_0000, |g| {
        let mut next = g.create_label();
        g.mov(eax, edx)?;
        g.shr(eax, 3)?;
        g.cmp(eax, 0x3f8 >> 3)?;
        g.je(next)?;
        g.xor(eax, eax)?;
        write(g)?;
        g.place(&mut next)?;
        g.inc(edx)
    })
}

/// An IOAPIC entry for a level-triggered, active-low pin.
const LEVEL: u32 = 0xa040;

cases! {
    bytes_from_all_ports: Pass, |g| in_all_ports(g, |g| g.in_(al, dx));
    words_from_all_ports: Pass, |g| in_all_ports(g, |g| g.in_(ax, dx));
    doublewords_from_all_ports: Pass, |g| in_all_ports(g, |g| g.in_(eax, dx));
    bytes_to_all_ports: Pass, |g| out_all_ports(g, |g| g.out(dx, al));
    words_to_all_ports: Pass, |g| out_all_ports(g, |g| g.out(dx, ax));
    doublewords_to_all_ports: Pass, |g| out_all_ports(g, |g| g.out(dx, eax));

    absent_ports_read_as_ones: Pass, |g| {
        for port in [0x21_u32, 0x71, 0x80, 0x1f0, 0x2f8, 0x510, 0x5658, 0xffff] {
            g.mov(edx, port)?;
            g.mov(rax, 0x1111_1111_0000_0000_u64)?;
            g.in_(al, dx)?;
            g.require_rax(&format!("a byte of port {port:#x}"), 0x1111_1111_0000_00ff)?;
            g.in_(ax, dx)?;
            g.require_rax(&format!("a word of port {port:#x}"), 0x1111_1111_0000_ffff)?;
            g.in_(eax, dx)?;
            g.require_rax(&format!("a doubleword of port {port:#x}"), 0xffff_ffff)?;
        }
        Ok(())
    };

    string_port_instructions: Pass, |g| {
        for port in [0x80_u32, 0x5658] {
            for code in [&[0x6c_u8][..], &[0x6e], &[0xf3, 0x6c], &[0xf3, 0x6f], &[0x66, 0x6d]] {
                g.runs(&format!("{code:x?} on port {port:#x}"), |g| {
                    string_port(g, port, SCRATCH, 4)?;
                    g.db(code)
                })?;
            }
        }
        // The serial port's scratch register keeps what it is given.
        g.store(SCRATCH, 0)?;
        g.out_byte(0x3ff, 0x5a)?;
        string_port(g, 0x3ff, SCRATCH + 1, 3)?;
        g.db(&[0xf3, 0x6c])?;
        g.mov(rax, rcx)?;
        g.require_rax("all have come", 0)?;
        g.mov(rax, rdi)?;
        g.require_rax("RDI is behind them", SCRATCH + 4)?;
        g.load(SCRATCH)?;
        g.require_rax("three bytes", 0x5a5a_5a00)?;
        g.store(SCRATCH, 0x0033_2211)?;
        string_port(g, 0x3ff, SCRATCH, 3)?;
        g.db(&[0xf3, 0x6e])?;
        g.xor(eax, eax)?;
        g.in_(al, dx)?;
        g.require_rax("the last of three", 0x33)?;
        // Backwards, and more than one exit's worth.
        string_port(g, 0x3ff, SCRATCH + 0x1000, 1000)?;
        g.std()?;
        g.db(&[0xf3, 0x6c])?;
        g.cld()?;
        g.mov(rax, rdi)?;
        g.require_rax("RDI is before them", SCRATCH + 0x1000 - 1000)?;
        for (what, code) in [("INS", [0xf3_u8, 0x6c]), ("OUTS", [0xf3, 0x6e])] {
            g.faults(&format!("{what} where there is no page"), vector::PF, |g| {
                string_port(g, 0x3ff, 1 << 40, 4)?;
                g.db(&code)
            })?;
            g.mov(rax, at(state::CR2))?;
            g.require_rax("its address", 1 << 40)?;
            g.faults(&format!("{what} where no address is"), vector::GP, |g| {
                string_port(g, 0x3ff, 1 << 62, 4)?;
                g.db(&code)
            })?;
        }
        // Over the edge of what is mapped, the first 4 GiB: no part is moved.
        g.faults("INS over an edge", vector::PF, |g| {
            string_port(g, 0x3fe, (1 << 32) - 2, 1)?;
            g.db(&[0x6d])
        })
    };

    every_serial_register: Pass, |g| {
        for value in [0xff_u8, 0x00, 0x80, 0x55] {
            for offset in 1..8 {
                g.out_byte(0x3f8 + offset, value)?;
                g.mov(edx, u32::from(0x3f8 + offset))?;
                g.in_(al, dx)?;
            }
        }
        // A sane line again, for the verdict.
        g.out_byte(0x3fb, 0x03)?;
        g.out_byte(0x3fc, 0x00)?;
        g.out_byte(0x3f9, 0x00)
    };

    every_interrupt_controller_register: Pass, |g| {
        g.xor(r12, r12)?;
        g.repeat(256, |g| {
            for value in [0_u32, u32::MAX, 0x0001_a5ff, 0x0001_0000] {
                g.mov(rdi, IOAPIC_SELECT)?;
                g.mov(dword_ptr(rdi), r12d)?;
                g.mov(eax, dword_ptr(rdi + 0x10))?;
                g.mov(dword_ptr(rdi + 0x10), value)?;
            }
            g.inc(r12)
        })?;
        g.mov(rdi, IOAPIC_SELECT)?;
        g.mov(r12, 0x1000_u64)?;
        g.sub(r12, 16)?;
        let mut again = g.create_label();
        g.place(&mut again)?;
        g.mov(rax, qword_ptr(rdi + r12))?;
        g.mov(al, byte_ptr(rdi + r12 + 1))?;
        g.mov(dword_ptr(rdi + r12 + 4), u32::MAX)?;
        g.sub(r12, 8)?;
        g.jns(again)
    };

    interrupt_pins_with_all_delivery_modes: Pass, |g| {
        // NMIs come, too.
        g.mov(at(state::RECOVERY), 1)?;
        g.enable_apic()?;
        g.sti()?;
        for entry in [0x0000_0200_u32, 0x300, 0x400, 0x500, 0x700, 0x000f, 0x0105, 0x0940, LEVEL] {
            if entry == LEVEL {
                // Nobody lowers the pin: it would come again for ever.
                g.cli()?;
            }
            for (register, value) in [(0x19_u32, 0xff00_0000), (0x18, entry)] {
                g.store(IOAPIC_SELECT, register)?;
                g.store(IOAPIC_DATA, value)?;
            }
            // Transmitter empty: the serial port raises its pin.
            g.out_byte(0x3f9, 0)?;
            g.out_byte(0x3fc, 8)?;
            g.out_byte(0x3f9, 2)?;
            g.cpuid()?;
        }
        g.out_byte(0x3f9, 0)?;
        g.mov(at(state::RECOVERY), 0)
    };

    the_serial_interrupt: Pass, |g| {
        g.enable_apic()?;
        for (register, value) in [(0x19_u32, 0), (0x18, 0x41)] {
            g.store(IOAPIC_SELECT, register)?;
            g.store(IOAPIC_DATA, value)?;
        }
        g.sti()?;
        g.out_byte(0x3fc, 8)?;
        g.out_byte(0x3f9, 2)?;
        g.cpuid()?;
        g.require_interrupts("it comes", 0x41, 1)
    };

    every_virtio_register: Pass, |g| {
        for value in [0_u64, u64::MAX, 0x0101_0101_0101_0101] {
            g.mov(rdi, VIRTIO)?;
            g.repeat(0x1000 - 8, |g| {
                g.mov(rax, value)?;
                g.mov(cl, byte_ptr(rdi))?;
                g.mov(cx, word_ptr(rdi))?;
                g.mov(ecx, dword_ptr(rdi))?;
                g.mov(rcx, qword_ptr(rdi))?;
                g.mov(byte_ptr(rdi), al)?;
                g.mov(word_ptr(rdi), ax)?;
                g.mov(dword_ptr(rdi), eax)?;
                g.inc(rdi)
            })?;
        }
        Ok(())
    };

    virtio_queues_in_nothing: Pass, |g| {
        for place in [0xe000_0000, VIRTIO, 256 << 30, !0xf, 1 << 63, 0x07ff_fff0] {
            negotiate(g)?;
            for queue in 0..4 {
                set_queue(g, queue, 64, [place; 3])?;
            }
            set(g, virtio::STATUS, 15)?;
            for queue in 0..4 {
                set(g, virtio::NOTIFY, queue)?;
            }
        }
        Ok(())
    };

    virtio_queues_of_wild_sizes: Pass, |g| {
        for size in [0, 3, 0x8000, 0xffff, 0x1_0000, u32::MAX] {
            negotiate(g)?;
            for queue in [0, 1, 3, 17, u32::MAX] {
                set_queue(g, queue, size, [DESCRIPTOR_TABLE, AVAILABLE, USED])?;
            }
            set(g, virtio::STATUS, 15)?;
            kick(g, 1, &[0])?;
        }
        Ok(())
    };

    virtio_queues_that_overlap: Pass, |g| {
        negotiate(g)?;
        for queue in 0..4 {
            set_queue(g, queue, 8, [SCRATCH; 3])?;
        }
        set(g, virtio::STATUS, 15)?;
        for value in [0_u32, 0x0001_0001, u32::MAX] {
            g.store(SCRATCH, value)?;
            kick(g, 1, &[0])?;
        }
        Ok(())
    };

    virtio_chain_without_end: Pass, |g| {
        try_chain(g, |g| describe(g, 0, SCRATCH + 0x4000, 16, 1, 0))?;
        try_chain(g, |g| describe(g, 0, SCRATCH + 0x4000, 16, 3, 0))?;
        try_chain(g, |g| {
            describe(g, 0, SCRATCH + 0x4000, 0, 1, 1)?;
            describe(g, 1, SCRATCH + 0x4000, 0, 1, 0)
        })
    };

    virtio_chain_to_nowhere: Pass, |g| {
        for (address, len) in [
            (0xe000_0000, 16),
            (u64::MAX - 7, 16),
            (SCRATCH, u32::MAX),
            (0x07ff_fff8, 4096),
            (256 << 30, 4096),
            (VIRTIO, 256),
            (SCRATCH + 0x4000, 0),
        ] {
            for flags in [0, 2] {
                try_chain(g, |g| describe(g, 0, address, len, flags, 0))?;
            }
        }
        Ok(())
    };

    virtio_descriptors_outside_of_the_table: Pass, |g| {
        try_chain(g, |g| describe(g, 0, SCRATCH + 0x4000, 16, 1, 0xffff))?;
        // Indirect, which was not offered.
        try_chain(g, |g| describe(g, 0, SCRATCH + 0x4000, 16, 4, 0))?;
        try_chain(g, |g| describe(g, 0, SCRATCH + 0x4000, 16, 7, 9))?;
        negotiate(g)?;
        for queue in 0..4 {
            set_queue(g, queue, 8, [DESCRIPTOR_TABLE, AVAILABLE, USED])?;
        }
        set(g, virtio::STATUS, 15)?;
        kick(g, 1, &[0xffff])?;
        kick(g, 2, &[8, 8])
    };

    virtio_index_that_jumps: Pass, |g| {
        for index in [9, 0x7fff, 0x8000, 0xffff] {
            negotiate(g)?;
            describe(g, 0, SCRATCH + 0x4000, 16, 0, 0)?;
            for queue in 0..4 {
                set_queue(g, queue, 8, [DESCRIPTOR_TABLE, AVAILABLE, USED])?;
            }
            set(g, virtio::STATUS, 15)?;
            kick(g, index, &[0, 0, 0, 0, 0, 0, 0, 0])?;
        }
        Ok(())
    };

    virtio_status_in_any_order: Pass, |g| {
        for status in [15, 4, 8, 0x80, 0xff, u32::MAX, 0, 12, 1, 15, 0] {
            set(g, virtio::STATUS, status)?;
            kick(g, 1, &[0])?;
        }
        Ok(())
    };

    every_pci_address: Pass, |g| {
        g.mov(r12, 0x8000_0000_u64)?;
        g.repeat(0x4000, |g| {
            g.mov(edx, 0xcf8)?;
            g.mov(eax, r12d)?;
            g.out(dx, eax)?;
            g.mov(edx, 0xcfc)?;
            g.in_(eax, dx)?;
            g.mov(eax, u32::MAX)?;
            g.out(dx, eax)?;
            g.add(r12, 0x404)
        })
    };
}

/// The registers of an INS or OUTS.
fn string_port(g: &mut Guest, port: u32, memory: u64, count: u64) -> Assembled {
    g.mov(edx, port)?;
    g.mov(rdi, memory)?;
    g.mov(rsi, memory)?;
    g.mov(rcx, count)
}
