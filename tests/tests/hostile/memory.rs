//! Addresses where there is nothing, or not what the guest takes it for.

use super::*;

/// Guest physical addresses below 4 GiB that nothing answers at.
const HOLES: [u64; 6] = [
    0x0800_0000,
    0xc800_0000,
    0xe000_0000,
    0xfed0_0000,
    0xfee0_0000,
    0xffff_fff0,
];
const IOAPIC: u64 = 0xfec0_0000;
/// Behind the last byte of memory.
const RAM_END: u64 = 128 << 20;

cases! {
    nothing_reads_as_ones: Pass, |g| {
        for hole in HOLES {
            g.load(hole)?;
            g.require_rax(&format!("read {hole:#x}"), 0xffff_ffff)?;
            g.mov(rax, qword_ptr(rdi))?;
            g.require_rax(&format!("read 8 bytes at {hole:#x}"), u64::MAX)?;
            g.movzx(eax, byte_ptr(rdi + 1))?;
            g.require_rax(&format!("read a byte at {hole:#x}"), 0xff)?;
            g.movzx(eax, word_ptr(rdi + 2))?;
            g.require_rax(&format!("read 2 bytes at {hole:#x}"), 0xffff)?;
        }
        Ok(())
    };

    writes_to_nothing_are_dropped: Pass, |g| {
        for hole in HOLES {
            g.store(hole, 0x5555_5555)?;
            g.load(hole)?;
            g.require_rax(&format!("write {hole:#x}"), 0xffff_ffff)?;
            g.mov(qword_ptr(rdi), 0)?;
            g.mov(byte_ptr(rdi), 0)?;
            g.or(dword_ptr(rdi), 1)?;
        }
        Ok(())
    };

    nothing_is_executed: Pass, |g| {
        for hole in HOLES {
            g.faults(&format!("jump to {hole:#x}"), vector::GP, |g| {
                g.mov(rax, hole)?;
                g.jmp(rax)
            })?;
        }
        Ok(())
    };

    devices_are_not_executed: Pass, |g| {
        for device in [IOAPIC, 0xd000_0000] {
            g.faults(&format!("jump to {device:#x}"), vector::GP, |g| {
                g.mov(rax, device)?;
                g.jmp(rax)
            })?;
        }
        Ok(())
    };

    code_that_runs_off_the_end_of_memory: Pass, |g| {
        g.faults("run off", vector::GP, |g| {
            g.mov(rdi, RAM_END - 4)?;
            g.mov(dword_ptr(rdi), 0x9090_9090_u32)?;
            g.jmp(rdi)
        })
    };

    an_access_that_crosses_the_end_of_memory: PassOrCrash, |g| {
        g.attempt(|g| {
            g.mov(rdi, RAM_END - 4)?;
            g.mov(rax, qword_ptr(rdi))?;
            g.mov(qword_ptr(rdi), rax)
        })
    };

    far_addresses: Pass, |g| {
        for gpa in [1_u64 << 33, 0x3f_ffe0_0000, 256 << 30, 1 << 39, (1 << 40) - (2 << 20)] {
            g.map_window(gpa)?;
            g.load(WINDOW + 0x1234)?;
            g.require_rax(&format!("read {gpa:#x}"), 0xffff_ffff)?;
            g.store(WINDOW, 1)?;
        }
        Ok(())
    };

    addresses_that_no_processor_has: PassOrCrash, |g| {
        for bit in [40, 44, 47, 48, 50, 51] {
            g.map_window(1 << bit)?;
            g.attempt(|g| g.load(WINDOW))?;
            g.attempt(|g| g.store(WINDOW, 0))?;
        }
        Ok(())
    };

    page_tables_in_nothing: Crash, |g| {
        g.mov(rax, 0xe000_0000_u64)?;
        g.mov(cr3, rax)
    };

    page_tables_in_a_device: Crash, |g| {
        g.mov(rax, IOAPIC)?;
        g.mov(cr3, rax)
    };

    page_tables_behind_all_memory: Crash, |g| {
        g.mov(rax, 0xff_ffff_f000_u64)?;
        g.mov(cr3, rax)
    };

    page_tables_of_ones: Crash, |g| {
        g.mov(rdi, SCRATCH)?;
        g.mov(rax, u64::MAX)?;
        g.mov(rcx, 512_u64)?;
        g.rep().stosq()?;
        g.mov(rax, SCRATCH)?;
        g.mov(cr3, rax)
    };

    a_lower_table_in_nothing: Pass, |g| {
        g.mov(rdi, viaduct_tests::guest::PAGE_TABLES + 4096 + 3 * 8)?;
        g.mov(rax, 0xe000_0003_u64)?;
        g.mov(qword_ptr(rdi), rax)?;
        g.mov(rax, cr3)?;
        g.mov(cr3, rax)?;
        g.faults("read through it", vector::GP, |g| g.load(0xc000_0000))
    };

    interrupt_table_in_nothing: Crash, |g| {
        g.mov(rdi, SCRATCH)?;
        g.mov(word_ptr(rdi), 0xfff)?;
        g.mov(rax, 0xe000_0000_u64)?;
        g.mov(qword_ptr(rdi + 2), rax)?;
        g.lidt(ptr(rdi))?;
        g.ud2()
    };

    interrupt_table_in_a_device: Crash, |g| {
        g.mov(rdi, SCRATCH)?;
        g.mov(word_ptr(rdi), 0xfff)?;
        g.mov(rax, IOAPIC)?;
        g.mov(qword_ptr(rdi + 2), rax)?;
        g.lidt(ptr(rdi))?;
        g.ud2()
    };

    segment_table_in_nothing: Crash, |g| {
        g.mov(rdi, SCRATCH)?;
        g.mov(word_ptr(rdi), 0xfff)?;
        g.mov(rax, 0xe000_0000_u64)?;
        g.mov(qword_ptr(rdi + 2), rax)?;
        g.lgdt(ptr(rdi))?;
        g.mov(eax, 0x18)?;
        g.mov(ds, ax)
    };

    stack_in_nothing: Crash, |g| {
        g.mov(rsp, 0xe000_1000_u64)?;
        g.ud2()
    };

    stack_in_a_device: Crash, |g| {
        g.mov(rsp, IOAPIC + 0x100)?;
        g.int(0x60)
    };

    task_segment_in_nothing: Crash, |g| {
        // The stack for exceptions in user mode comes from it.
        g.sgdt(ptr(rsp - 32))?;
        g.mov(rdi, qword_ptr(rsp - 30))?;
        g.mov(rax, 0xe000_8900_0000_0067_u64)?;
        g.mov(qword_ptr(rdi + i32::from(selector::TASK)), rax)?;
        g.mov(eax, u32::from(selector::TASK))?;
        g.ltr(ax)?;
        g.enter_user_mode()?;
        g.ud2()
    };

    vector_store_to_a_device: Crash, |g| {
        g.mov(rax, cr4)?;
        g.or(eax, 0x200)?;
        g.mov(cr4, rax)?;
        g.mov(rdi, IOAPIC)?;
        g.movups(xmmword_ptr(rdi), xmm0)
    };

    strings_to_and_from_devices: PassOrCrash, |g| {
        g.mov(rdi, IOAPIC)?;
        g.mov(rsi, SCRATCH)?;
        g.mov(rcx, 16_u64)?;
        g.attempt(|g| g.rep().movsd())
    };

    a_copy_over_the_end_of_memory: PassOrCrash, |g| {
        g.mov(rsi, SCRATCH)?;
        g.mov(rdi, RAM_END - 0x1800)?;
        g.mov(rcx, 0x4000_u64)?;
        g.attempt(|g| g.rep().movsb())
    };

    a_fill_over_the_end_of_memory: PassOrCrash, |g| {
        g.mov(rdi, RAM_END - 0x1800)?;
        g.mov(rcx, 0x4000_u64)?;
        g.attempt(|g| g.rep().stosq())
    };

    locked_instructions_on_a_device: PassOrCrash, |g| {
        g.mov(rdi, IOAPIC)?;
        g.attempt(|g| g.lock().add(dword_ptr(rdi), 1))?;
        g.attempt(|g| g.xchg(dword_ptr(rdi), eax))?;
        g.attempt(|g| g.lock().cmpxchg(dword_ptr(rdi), ecx))
    };

    wide_exchange_on_a_device: PassOrCrash, |g| {
        g.mov(rdi, IOAPIC)?;
        g.attempt(|g| g.lock().cmpxchg16b(xmmword_ptr(rdi)))
    };

    stack_instructions_on_a_device: PassOrCrash, |g| {
        g.mov(rdi, IOAPIC)?;
        g.attempt(|g| g.push(qword_ptr(rdi)))?;
        g.attempt(|g| g.pop(qword_ptr(rdi)))
    };

    a_call_through_a_device: PassOrCrash, |g| {
        g.mov(rdi, IOAPIC)?;
        g.attempt(|g| g.call(qword_ptr(rdi)))
    };

    saved_state_in_nothing: PassOrCrash, |g| {
        g.mov(rax, cr4)?;
        g.or(eax, 0x200)?;
        g.mov(cr4, rax)?;
        g.mov(rdi, 0xe000_0000_u64)?;
        g.attempt(|g| g.fxsave(ptr(rdi)))?;
        g.attempt(|g| g.fxrstor(ptr(rdi)))
    };

    a_device_register_in_user_mode: Pass, |g| {
        g.faults("it goes on", vector::UD, |g| {
            g.enter_user_mode()?;
            g.load(IOAPIC)?;
            g.store(IOAPIC, 1)?;
            g.ud2()
        })
    };

    an_instruction_over_two_pages_at_a_device: Pass, |g| {
        // MOV EAX, [RDI]; UD2 with a page's edge inside of the first.
        g.mov(rsi, SCRATCH + 0xfff)?;
        g.mov(dword_ptr(rsi), 0x0b0f_078b_u32)?;
        g.faults("it goes on", vector::UD, |g| {
            g.mov(rdi, 0xe000_0000_u64)?;
            g.jmp(rsi)
        })?;
        g.require_rax("it reads", 0xffff_ffff)
    };

    code_that_changes_itself: Pass, |g| {
        // MOV EAX, n; RET, for a thousand n.
        g.mov(rdi, SCRATCH)?;
        g.mov(byte_ptr(rdi), 0xb8)?;
        g.mov(byte_ptr(rdi + 5), 0xc3)?;
        g.repeat(1000, |g| {
            g.mov(dword_ptr(rdi + 1), ebx)?;
            g.call(rdi)?;
            g.require("the new instruction", |g, ok| {
                g.cmp(eax, ebx)?;
                g.je(ok)
            })
        })
    };
}

/// Bytes of a file system that is none, but for its magic number.
fn image() -> Vec<u8> {
    let mut bytes = viaduct_tests::noise(4 << 20);
    bytes[1080..1082].copy_from_slice(&[0x53, 0xef]);
    bytes
}

#[test]
fn the_image_cannot_be_written() {
    const PMEM: u64 = 256 << 30;
    let bytes = image();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("image");
    std::fs::write(&path, &bytes).expect("writable");
    let machine = Machine {
        image: Some(path.clone()),
        ..Machine::default()
    };
    let word = |at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().expect("inside"));
    check(&machine, Expect::Pass, |g| {
        g.map_window(PMEM)?;
        for offset in [0_u16, 8, 0x1000, 0x7ff8] {
            let expected = word(usize::from(offset));
            g.mov(rdi, WINDOW + u64::from(offset))?;
            g.mov(rax, qword_ptr(rdi))?;
            g.require_rax("as it was", expected)?;
            g.mov(qword_ptr(rdi), 0)?;
            g.mov(byte_ptr(rdi + 3), 0x55)?;
            g.mov(rax, qword_ptr(rdi))?;
            g.require_rax("a write is dropped", expected)?;
        }
        Ok(())
    });
    assert!(std::fs::read(&path).expect("readable") == bytes);
}

#[test]
fn the_image_survives_instructions_that_are_not_emulated() {
    const PMEM: u64 = 256 << 30;
    let bytes = image();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("image");
    std::fs::write(&path, &bytes).expect("writable");
    let machine = Machine {
        image: Some(path.clone()),
        ..Machine::default()
    };
    check(&machine, Expect::PassOrCrash, |g| {
        g.map_window(PMEM)?;
        g.mov(rdi, WINDOW)?;
        g.mov(rcx, 512_u64)?;
        g.attempt(|g| g.rep().stosq())
    });
    assert!(std::fs::read(&path).expect("readable") == bytes);
}
