//! Ways to end a VM, and guests that never end.

use super::*;

cases! {
    power_off: Pass, |_| Ok(());

    reset_by_the_sleep_port: Reset, |g| g.out_byte(0x600, 1);

    reset_by_the_keyboard_controller: Reset, |g| g.out_byte(0x64, 0xfe);

    triple_fault_without_handlers: Crash, |g| {
        g.xor(eax, eax)?;
        g.mov(rdi, SCRATCH)?;
        g.mov(qword_ptr(rdi), 0)?;
        g.mov(qword_ptr(rdi + 8), 0)?;
        g.lidt(ptr(rdi))?;
        g.ud2()
    };

    triple_fault_by_an_interrupt: Crash, |g| {
        g.mov(rdi, SCRATCH)?;
        g.mov(qword_ptr(rdi), 0)?;
        g.mov(qword_ptr(rdi + 8), 0)?;
        g.lidt(ptr(rdi))?;
        g.enable_apic()?;
        g.sti()?;
        g.write_msr(0x83f, 0x40)?;
        g.nop()
    };

    no_stack: Crash, |g| {
        g.mov(rsp, 0x8000_0000_0000_0000_u64)?;
        g.push(rax)
    };

    endless_undefined_instructions: Pass[2], |g| {
        g.let_second_vcpu_end_it()?;
        g.mov(at(state::RECOVERY), 1)?;
        g.ud2()
    };

    endless_page_faults: Pass[2], |g| {
        g.let_second_vcpu_end_it()?;
        g.mov(at(state::RECOVERY), 1)?;
        g.mov(rdi, 0x80_0000_0000_u64)?;
        g.mov(rax, qword_ptr(rdi))
    };

    endless_alignment_checks: Pass[2], |g| {
        g.let_second_vcpu_end_it()?;
        g.mov(rax, cr0)?;
        g.or(eax, 1 << 18)?;
        g.mov(cr0, rax)?;
        g.mov(at(state::RECOVERY), 1)?;
        g.enter_user_mode()?;
        g.push(0x4_0202)?;
        g.popfq()?;
        g.mov(rdi, SCRATCH + 1)?;
        let mut again = g.create_label();
        g.place(&mut again)?;
        g.mov(rax, qword_ptr(rdi))?;
        g.jmp(again)
    };

    endless_debug_exceptions: Pass[2], |g| {
        g.let_second_vcpu_end_it()?;
        g.mov(at(state::RECOVERY), 1)?;
        // Delivering the exception writes where the next one lurks.
        g.mov(rax, rsp)?;
        g.sub(rax, 16)?;
        g.and(rax, -8)?;
        g.mov(dr0, rax)?;
        g.sub(rax, 16)?;
        g.mov(dr1, rax)?;
        g.mov(rax, 0x0099_04ff_u64)?;
        g.mov(dr7, rax)?;
        let mut again = g.create_label();
        g.place(&mut again)?;
        g.int3()?;
        g.jmp(again)
    };

    endless_single_steps: Pass[2], |g| {
        g.let_second_vcpu_end_it()?;
        g.mov(at(state::RECOVERY), 1)?;
        g.push(0x102)?;
        g.popfq()?;
        let mut again = g.create_label();
        g.place(&mut again)?;
        g.nop()?;
        g.jmp(again)
    };

    endless_loop_without_interrupts: Pass[2], |g| {
        g.let_second_vcpu_end_it()?;
        g.cli()?;
        let mut again = g.create_label();
        g.place(&mut again)?;
        g.jmp(again)
    };

    one_vcpu_shuts_down: Crash[2], |g| {
        g.second_vcpu(|code| {
            let mut again = code.create_label();
            code.set_label(&mut again)?;
            code.jmp(again)
        })?;
        g.start_second_vcpu()?;
        g.mov(rdi, SCRATCH)?;
        g.mov(qword_ptr(rdi), 0)?;
        g.mov(qword_ptr(rdi + 8), 0)?;
        g.lidt(ptr(rdi))?;
        g.ud2()
    };
}
