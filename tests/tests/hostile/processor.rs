//! Instructions and registers that a guest has no business with.

use super::*;

/// VMRUN, VMLOAD, VMSAVE, STGI, CLGI, SKINIT, INVLPGA.
const SVM: [u8; 7] = [0xd8, 0xda, 0xdb, 0xdc, 0xdd, 0xde, 0xdf];

/// MSRs that a virtual processor of this kind doesn't have.
const ABSENT_MSRS: [u32; 22] = [
    0x3b,
    0x48,
    0x49,
    0xc1,
    0x10a,
    0x179,
    0x1fff,
    0x2000,
    0xda0,
    0x900,
    0x4000_0000,
    0x4b56_4d02,
    0x4b56_4d05,
    0xc000_0005,
    0xc000_1fff,
    0xc001_0000,
    0xc001_0114,
    0xc001_0117,
    0xc001_0131,
    0xc001_1fff,
    0x8000_0000,
    0xffff_ffff,
];

/// Reads all MSRs of a range and writes back what can be read.
fn sweep_msrs(g: &mut Guest, first: u32, count: u64) -> Assembled {
    g.mov(r12, u64::from(first))?;
    g.repeat(count, |g| {
        g.attempt(|g| {
            g.mov(ecx, r12d)?;
            g.rdmsr()?;
            g.wrmsr()
        })?;
        g.inc(r12)
    })
}

cases! {
    unknown_msrs: Pass, |g| {
        for msr in ABSENT_MSRS {
            g.faults(&format!("RDMSR {msr:#x}"), vector::GP, |g| g.read_msr(msr))?;
            g.faults(&format!("WRMSR {msr:#x}"), vector::GP, |g| g.write_msr(msr, 0))?;
            g.faults(&format!("WRMSR {msr:#x}"), vector::GP, |g| g.write_msr(msr, u64::MAX))?;
        }
        Ok(())
    };

    every_msr: Pass, |g| {
        sweep_msrs(g, 0, 0x800)?;
        // Not the x2APIC's: an ICR of 0 is sent.
        sweep_msrs(g, 0x900, 0x1700)?;
        sweep_msrs(g, 0x4000_0000, 0x200)?;
        sweep_msrs(g, 0x4b56_4d00, 0x100)?;
        sweep_msrs(g, 0xc000_0000, 0x2000)?;
        sweep_msrs(g, 0xc001_0000, 0x2000)
    };

    svm_instructions: Pass, |g| {
        for opcode in SVM {
            g.faults(&format!("0f 01 {opcode:x}"), vector::UD, |g| {
                g.mov(rax, SCRATCH)?;
                g.xor(ecx, ecx)?;
                g.db(&[0x0f, 0x01, opcode])
            })?;
        }
        Ok(())
    };

    svm_instructions_in_user_mode: Pass, |g| {
        for opcode in SVM {
            g.attempt(|g| {
                g.enter_user_mode()?;
                g.mov(rax, SCRATCH)?;
                g.db(&[0x0f, 0x01, opcode])
            })?;
            require_ud_or_gp(g, &format!("0f 01 {opcode:x}"))?;
        }
        Ok(())
    };

    svm_is_hidden: Pass, |g| {
        g.mov(eax, 0x8000_0001_u32)?;
        g.cpuid()?;
        g.mov(eax, ecx)?;
        g.and(eax, 4)?;
        g.require_rax("the SVM bit of CPUID", 0)?;
        g.read_msr(EFER)?;
        g.and(eax, 1 << 12)?;
        g.require_rax("EFER.SVME", 0)?;
        g.faults("set EFER.SVME", vector::GP, |g| g.write_msr(EFER, 0x1500))
    };

    unknown_hypercalls: Pass, |g| {
        for number in [0, 1, 2, 3, 9, 11, 12, 1000, 1 << 32 | 5, u64::MAX] {
            g.hypercall(number)?;
            g.require_rax(&format!("hypercall {number:#x}"), 1000_u64.wrapping_neg())?;
        }
        Ok(())
    };

    hypercall_in_user_mode: Pass, |g| {
        g.faults("VMMCALL", vector::UD, |g| {
            g.enter_user_mode()?;
            g.hypercall(10)
        })
    };

    rdpmc: Pass, |g| {
        for counter in [0_u32, 1, 5, 0x4000_0000, u32::MAX] {
            g.faults("RDPMC", vector::GP, |g| {
                g.mov(ecx, counter)?;
                g.rdpmc()
            })?;
        }
        Ok(())
    };

    xsetbv: Pass, |g| {
        let set = |g: &mut Guest, register: u32, value: u64| {
            g.mov(ecx, register)?;
            g.mov(rax, value)?;
            g.mov(rdx, value >> 32)?;
            g.xsetbv()
        };
        g.faults("XSETBV without OSXSAVE", vector::UD, |g| set(g, 0, 1))?;
        g.mov(rax, cr4)?;
        g.or(eax, 1 << 18)?;
        g.mov(cr4, rax)?;
        for (register, value) in [(0, 0), (0, 2), (0, 1 << 62 | 1), (0, 1 << 63), (1, 1), (9, 3)] {
            g.faults(&format!("XCR{register} = {value:#x}"), vector::GP, |g| {
                set(g, register, value)
            })?;
        }
        g.runs("XCR0 = 1", |g| set(g, 0, 1))?;
        g.runs("XCR0 = 3", |g| set(g, 0, 3))?;
        g.faults("XSETBV in user mode", vector::GP, |g| {
            g.enter_user_mode()?;
            set(g, 0, 1)
        })
    };

    monitor_and_mwait: Pass, |g| {
        for (name, opcode) in [("MONITOR", 0xc8), ("MWAIT", 0xc9), ("MONITORX", 0xfa)] {
            g.attempt(|g| {
                g.mov(rax, SCRATCH)?;
                g.xor(ecx, ecx)?;
                g.xor(edx, edx)?;
                g.db(&[0x0f, 0x01, opcode])
            })?;
            g.require(name, |g, ok| {
                g.cmp(at(state::VECTOR), vector::UD)?;
                g.je(ok)
            })?;
        }
        Ok(())
    };

    rsm: Pass, |g| g.faults("RSM", vector::UD, |g| g.db(&[0x0f, 0xaa]));

    rdpru: Pass, |g| g.faults("RDPRU", vector::UD, |g| g.db(&[0x0f, 0x01, 0xfd]));

    every_cpuid_leaf: Pass, |g| {
        for first in [0_u64, 0x4000_0000, 0x8000_0000, 0xc000_0000, 0xffff_ff80] {
            g.mov(r12, first)?;
            g.repeat(0x80, |g| {
                for subleaf in [0_u32, 1, 2, 3, 17, 63, 0x8000_0000, u32::MAX] {
                    g.mov(r10, rbx)?;
                    g.mov(eax, r12d)?;
                    g.mov(ecx, subleaf)?;
                    g.cpuid()?;
                    g.mov(rbx, r10)?;
                }
                g.inc(r12)
            })?;
        }
        Ok(())
    };

    random_cpuid_leaves: Pass, |g| {
        g.mov(r12, 0x1234_5678_9abc_def1_u64)?;
        g.mov(r11, 6_364_136_223_846_793_005_u64)?;
        g.repeat(5_000, |g| {
            g.imul_2(r12, r11)?;
            g.add(r12, 12345)?;
            g.mov(r10, rbx)?;
            g.mov(rax, r12)?;
            g.mov(rcx, r12)?;
            g.shr(rcx, 32)?;
            g.cpuid()?;
            g.mov(rbx, r10)
        })
    };

    illegal_efer: Pass, |g| {
        for bit in [1, 2, 7, 9, 12, 13, 16, 31, 32, 63] {
            g.faults(&format!("EFER bit {bit}"), vector::GP, |g| {
                g.write_msr(EFER, 1 << bit | 0x500)
            })?;
        }
        g.faults("no LME under paging", vector::GP, |g| g.write_msr(EFER, 0x400))?;
        g.faults("nothing under paging", vector::GP, |g| g.write_msr(EFER, 0))?;
        g.runs("SCE and NXE", |g| g.write_msr(EFER, 0xd01))?;
        g.read_msr(EFER)?;
        g.require_rax("EFER", 0xd01)
    };

    illegal_pat: Pass, |g| {
        for kind in [2_u64, 3, 8, 0x80, 0xff] {
            for place in [0, 3, 7] {
                g.faults(&format!("PAT{place} = {kind}"), vector::GP, |g| {
                    g.write_msr(PAT, kind << (place * 8))
                })?;
            }
        }
        g.runs("all kinds", |g| g.write_msr(PAT, 0x0706_0504_0100_0706))?;
        g.read_msr(PAT)?;
        g.require_rax("PAT", 0x0706_0504_0100_0706)
    };

    control_register_0: PassOrCrash, |g| {
        for value in [0x2000_0000_u64 | 0x8000_0011, 0x8000_0000, 1 << 32, 1 << 63, u64::MAX, 0] {
            g.attempt(|g| {
                g.mov(rax, value)?;
                g.mov(cr0, rax)?;
                g.cpuid()
            })?;
        }
        Ok(())
    };

    write_through_without_cache_disable: PassOrCrash, |g| {
        g.attempt(|g| {
            g.mov(rax, 0xa000_0011_u64)?;
            g.mov(cr0, rax)?;
            g.cpuid()
        })
    };

    control_register_4: PassOrCrash, |g| {
        for bit in 0..64_u64 {
            g.attempt(|g| {
                g.mov(rax, 1_u64 << bit | 0x20)?;
                g.mov(cr4, rax)?;
                g.cpuid()
            })?;
            g.attempt(|g| {
                g.mov(eax, 0x20)?;
                g.mov(cr4, rax)
            })?;
        }
        Ok(())
    };

    no_paging_extension_in_long_mode: PassOrCrash, |g| {
        g.faults("CR4.PAE = 0", vector::GP, |g| {
            g.xor(eax, eax)?;
            g.mov(cr4, rax)
        })
    };

    task_priority_register: Pass, |g| {
        // Emulators drop the high bits; processors refuse them.
        g.attempt(|g| {
            g.mov(eax, 16)?;
            g.mov(cr8, rax)
        })?;
        g.runs("CR8 = 15", |g| {
            g.mov(eax, 15)?;
            g.mov(cr8, rax)
        })?;
        g.read_msr(0x808)?;
        g.require_rax("TPR", 0xf0)
    };

    debug_registers: Pass, |g| {
        for (what, value) in [("DR7", 1_u64 << 32), ("DR7", 1 << 63)] {
            g.faults(what, vector::GP, |g| {
                g.mov(rax, value)?;
                g.mov(dr7, rax)
            })?;
        }
        // Aimed at everywhere, every kind at once.
        for (register, address) in [(dr0, 0x20_0000_u64), (dr1, SCRATCH), (dr2, STATE), (dr3, 0)] {
            g.mov(rax, address)?;
            g.mov(register, rax)?;
        }
        g.mov(at(state::RECOVERY), 1)?;
        g.mov(rax, 0xffff_07ff_u64)?;
        g.mov(dr7, rax)?;
        g.cpuid()?;
        g.cpuid()?;
        g.mov(eax, 0x400)?;
        g.mov(dr7, rax)
    };

    breakpoints_all_over_the_hypervisor: Pass, |g| {
        // One where every exit comes by, three that wander through its code,
        // the handlers of breakpoints included.
        let text = super::hypervisor_code();
        g.mov(at(state::RECOVERY), 1)?;
        g.mov(rax, text.behind_entry)?;
        g.mov(dr0, rax)?;
        g.mov(r12, text.start)?;
        g.mov(rax, 0x4ff_u64)?;
        g.mov(dr7, rax)?;
        g.repeat((text.end - text.start) / 3, |g| {
            for register in [dr1, dr2, dr3] {
                g.mov(register, r12)?;
                g.inc(r12)?;
            }
            g.mov(rax, 0x4ff_u64)?;
            g.mov(dr7, rax)?;
            g.mov(ecx, 0x8b)?;
            g.rdmsr()
        })
    };

    watchpoints_all_over_the_hypervisor: Pass, |g| {
        g.mov(at(state::RECOVERY), 1)?;
        // Its tables, its heap and the first 16 MiB, in steps.
        g.mov(r12, 0x10_0000_u64)?;
        g.repeat(20_000, |g| {
            for register in [dr0, dr1, dr2, dr3] {
                g.mov(register, r12)?;
                g.add(r12, 8 * 25)?;
            }
            // Reads and writes of eight bytes.
            g.mov(rax, 0xbbbb_04ff_u64)?;
            g.mov(dr7, rax)?;
            g.mov(ecx, 0x8b)?;
            g.rdmsr()?;
            g.mov(eax, 0x400)?;
            g.mov(dr7, rax)
        })
    };

    cache_instructions: Pass, |g| {
        g.store(SCRATCH, 0x1234_5678)?;
        g.runs("WBINVD", |g| g.wbinvd())?;
        g.runs("INVD", |g| g.invd())?;
        g.load(SCRATCH)?;
        g.require_rax("memory", 0x1234_5678)
    };

    prefixes_before_fixed_instructions: Pass, |g| {
        // As long as they are: none may be taken for a shorter one.
        let codes: [(&str, &[u8]); 6] = [
            ("REX.W CPUID", &[0x48, 0x0f, 0xa2]),
            ("REX.W RDMSR", &[0x48, 0x0f, 0x32]),
            ("DS CPUID", &[0x3e, 0x0f, 0xa2]),
            ("DS DS CPUID", &[0x3e, 0x3e, 0x0f, 0xa2]),
            ("REX.W WBINVD", &[0x48, 0x0f, 0x09]),
            ("REX.W VMMCALL", &[0x48, 0x0f, 0x01, 0xd9]),
        ];
        for (name, code) in codes {
            g.xor(r10, r10)?;
            g.runs(name, |g| {
                g.mov(ecx, 0x8b)?;
                g.mov(eax, 0)?;
                g.db(code)?;
                g.mov(r10, 0x77_u64)
            })?;
            g.mov(rax, r10)?;
            g.require_rax(name, 0x77)?;
        }
        Ok(())
    };

    wbnoinvd: Pass, |g| {
        g.attempt(|g| {
            g.mov(r12, 0x0123_4567_89ab_cdef_u64)?;
            g.mov(ecx, 0)?;
            // If only its last byte and what follows were executed, this
            // would be OR ECX, ECX or worse.
            g.db(&[0xf3, 0x0f, 0x09])?;
            g.mov(ecx, 0x77)
        })?;
        g.mov(eax, ecx)?;
        g.require_rax("ECX", 0x77)
    };

    time_goes_forward: Pass, |g| {
        g.xor(r12, r12)?;
        g.repeat(100_000, |g| {
            g.rdtsc()?;
            g.shl(rdx, 32)?;
            g.or(rax, rdx)?;
            g.require("RDTSC", |g, ok| {
                g.cmp(rax, r12)?;
                g.jae(ok)
            })?;
            g.mov(r12, rax)
        })?;
        // Across exits, and by every other way to the same clock.
        g.repeat(1_000, |g| {
            g.read_msr(0x10)?;
            g.require("RDMSR TSC", |g, ok| {
                g.cmp(rax, r12)?;
                g.jae(ok)
            })?;
            g.mov(r12, rax)?;
            g.rdtscp()?;
            g.shl(rdx, 32)?;
            g.or(rax, rdx)?;
            g.require("RDTSCP", |g, ok| {
                g.cmp(rax, r12)?;
                g.jae(ok)
            })?;
            g.mov(r12, rax)
        })
    };

    the_clock_cannot_be_set: Pass, |g| {
        g.read_msr(0x10)?;
        g.mov(r12, rax)?;
        for value in [0, 1, 1 << 63, u64::MAX] {
            g.runs("WRMSR TSC", |g| g.write_msr(0x10, value))?;
            g.read_msr(0x10)?;
            g.require("TSC", |g, ok| {
                g.sub(rax, r12)?;
                // Less than half an hour has gone by.
                g.shr(rax, 44)?;
                g.jz(ok)
            })?;
        }
        Ok(())
    };

    privileged_instructions_in_user_mode: Pass, |g| {
        let codes: [(&str, &[u8]); 12] = [
            ("HLT", &[0xf4]),
            ("CLI", &[0xfa]),
            ("IN", &[0xe4, 0x80]),
            ("OUT", &[0xe6, 0x80]),
            ("RDMSR", &[0x0f, 0x32]),
            ("WRMSR", &[0x0f, 0x30]),
            ("MOV CR0", &[0x0f, 0x22, 0xc0]),
            ("MOV CR3", &[0x0f, 0x22, 0xd8]),
            ("MOV DR7", &[0x0f, 0x23, 0xf8]),
            ("LIDT", &[0x0f, 0x01, 0x18]),
            ("WBINVD", &[0x0f, 0x09]),
            ("INVLPG", &[0x0f, 0x01, 0x38]),
        ];
        for (name, code) in codes {
            g.faults(name, vector::GP, |g| {
                g.enter_user_mode()?;
                g.mov(rax, SCRATCH)?;
                g.mov(ecx, 0x8b)?;
                g.db(code)
            })?;
        }
        Ok(())
    };

    task_switch: Pass, |g| {
        g.store(SCRATCH, 0)?;
        g.store(SCRATCH + 4, u32::from(selector::TASK))?;
        g.faults("far jump to a task", vector::GP, |g| {
            g.mov(rdi, SCRATCH)?;
            g.db(&[0xff, 0x2f])
        })?;
        g.faults("far call to a task", vector::GP, |g| {
            g.mov(rdi, SCRATCH)?;
            g.db(&[0xff, 0x1f])
        })?;
        g.faults("IRET with nested task", vector::GP, |g| {
            g.push(0x4002)?;
            g.popfq()?;
            g.iretq()
        })?;
        g.push(2)?;
        g.popfq()?;
        g.faults("LTR of a busy task", vector::GP, |g| {
            g.mov(eax, u32::from(selector::TASK))?;
            g.ltr(ax)
        })
    };

    system_call_to_nowhere: PassOrCrash, |g| {
        g.write_msr(EFER, 0x501)?;
        g.write_msr(0xc000_0081, u64::MAX)?;
        g.runs("a canonical LSTAR", |g| g.write_msr(0xc000_0082, 0xe000_0000))?;
        g.attempt(|g| g.syscall())
    };

    wild_values_in_passed_through_registers: PassOrCrash, |g| {
        for msr in [0x174, 0x175, 0x176, 0xc000_0081, 0xc000_0082, 0xc000_0083, 0xc000_0084,
            0xc000_0100, 0xc000_0101, 0xc000_0102]
        {
            for value in [u64::MAX, 1 << 47, 0x8000_0000_0000_0000, 0x20_0000] {
                g.attempt(|g| g.write_msr(msr, value))?;
                g.cpuid()?;
            }
        }
        Ok(())
    };

    time_stamp_auxiliary: Pass, |g| {
        g.runs("TSC_AUX", |g| g.write_msr(0xc000_0103, 0xffff_ffff))?;
        g.rdtscp()?;
        g.mov(eax, ecx)?;
        g.require_rax("RDTSCP's ECX", 0xffff_ffff)?;
        g.attempt(|g| g.write_msr(0xc000_0103, 1 << 32))
    };

    halt_without_interrupts: Stay, |g| {
        g.say("READY")?;
        g.cli()?;
        g.hlt()?;
        g.say("it woke")
    };
}

fn require_ud_or_gp(g: &mut Guest, what: &str) -> Assembled {
    g.require(what, |g, ok| {
        g.cmp(at(state::VECTOR), vector::UD)?;
        g.je(ok)?;
        g.cmp(at(state::VECTOR), vector::GP)?;
        g.je(ok)
    })
}
