//! The registers that exit handlers may look at and change.

/// A general-purpose register by its number in an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[expect(missing_docs, reason = "the names are the architecture's")]
pub enum Gpr {
    Rax = 0,
    Rcx,
    Rdx,
    Rbx,
    Rsp,
    Rbp,
    Rsi,
    Rdi,
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
}

impl Gpr {
    /// The register with this number in an instruction, 0 to 15.
    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        const ALL: [Gpr; 16] = [
            Gpr::Rax,
            Gpr::Rcx,
            Gpr::Rdx,
            Gpr::Rbx,
            Gpr::Rsp,
            Gpr::Rbp,
            Gpr::Rsi,
            Gpr::Rdi,
            Gpr::R8,
            Gpr::R9,
            Gpr::R10,
            Gpr::R11,
            Gpr::R12,
            Gpr::R13,
            Gpr::R14,
            Gpr::R15,
        ];
        if number < 16 {
            Some(ALL[number as usize])
        } else {
            None
        }
    }
}

/// A guest's general-purpose registers, instruction pointer and flags.
///
/// The world switch keeps all but RAX, RSP, RIP and RFLAGS here; those four
/// live in the VMCB while the guest runs and are copied at each exit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Registers {
    /// General-purpose registers, indexed by [`Gpr`].
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
}

impl Registers {
    /// The full 64 bits of a register.
    #[must_use]
    pub const fn get(&self, register: Gpr) -> u64 {
        self.gpr[register as usize]
    }

    /// Sets the full 64 bits of a register.
    pub const fn set(&mut self, register: Gpr, value: u64) {
        self.gpr[register as usize] = value;
    }

    /// The low half of a register.
    #[must_use]
    pub const fn get_u32(&self, register: Gpr) -> u32 {
        let [a, b, c, d, ..] = self.get(register).to_le_bytes();
        u32::from_le_bytes([a, b, c, d])
    }
}
