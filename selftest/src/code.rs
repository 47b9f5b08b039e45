//! Code of micro-guests, assembled with the image.

/// The bytes of some instructions, to be copied to wherever they are to run.
macro_rules! code {
    ($($line:literal),* $(,)?) => {{
        let (start, end): (*const u8, *const u8);
        // SAFETY: only addresses are taken; the instructions themselves lie
        // among the constants.
        unsafe {
            core::arch::asm!(
                "lea {start}, [rip + 771f]",
                "lea {end}, [rip + 772f]",
                ".pushsection .rodata.micro, \"a\"",
                "771:",
                $($line,)*
                "772:",
                ".popsection",
                start = out(reg) start,
                end = out(reg) end,
                options(nomem, nostack, preserves_flags)
            )
        };
        // SAFETY: both are addresses of one constant, in this order.
        unsafe { core::slice::from_raw_parts(start, end.addr() - start.addr()) }
    }};
}
pub(crate) use code;
