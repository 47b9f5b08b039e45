//! What an instruction that exited wants, where the exit doesn't tell.
//!
//! Of an access to a device register the exit gives the guest physical address; the instruction gives the
//! width, the direction and the registers. Only general-purpose moves and
//! the simple arithmetic that drivers and compilers use on registers are
//! known. String, stack and vector instructions are refused.

use iced_x86::{
    Decoder, DecoderError, DecoderOptions, Instruction, Mnemonic, OpKind, Register as Name,
};

use super::registers::{Gpr, Registers};
use crate::devices::Width;

const CARRY: u64 = 1 << 0;
const PARITY: u64 = 1 << 2;
const ADJUST: u64 = 1 << 4;
const ZERO: u64 = 1 << 6;
const SIGN: u64 = 1 << 7;
const OVERFLOW: u64 = 1 << 11;
const ARITHMETIC_FLAGS: u64 = CARRY | PARITY | ADJUST | ZERO | SIGN | OVERFLOW;

/// The default operand and address size of the code segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bitness {
    /// Real mode or a 16-bit segment.
    Bits16,
    /// A 32-bit segment.
    Bits32,
    /// Long mode.
    Bits64,
}

/// Why an instruction could not be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// The bytes end before the instruction does.
    Truncated {
        /// Where it starts.
        rip: u64,
    },
    /// The processor would raise #UD.
    Invalid {
        /// Where it starts.
        rip: u64,
    },
    /// A legal instruction that is not emulated on device registers.
    Unsupported {
        /// Where it starts.
        rip: u64,
    },
}

/// A register operand: which register and which part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegisterPart {
    /// The register.
    pub register: Gpr,
    /// How much of it.
    pub width: Width,
    /// Where in it that part is.
    pub position: Position,
}

/// Where in its register a register operand lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Position {
    /// From bit 0.
    Low,
    /// From bit 8: AH, CH, DH and BH.
    HighByte,
}

/// How a loaded value fills a wider register operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extension {
    /// With zeros.
    Zero,
    /// With copies of the sign bit.
    Sign,
}

/// An arithmetic operation that sets the flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alu {
    /// Sum.
    Add,
    /// Difference.
    Sub,
    /// Bitwise and.
    And,
    /// Bitwise or.
    Or,
    /// Bitwise exclusive or.
    Xor,
    /// As `Sub`, for the flags alone.
    Compare,
    /// As `And`, for the flags alone.
    Test,
}

/// What is done with the device register ("memory" below).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// register ← memory.
    Load {
        /// The destination, at least as wide as the access.
        to: RegisterPart,
        /// How it is filled if it is wider.
        extension: Extension,
    },
    /// memory ← value.
    Store {
        /// The value, no wider than the access.
        value: u64,
    },
    /// register ↔ memory.
    Exchange {
        /// The register.
        register: RegisterPart,
    },
    /// memory ← memory op value.
    Update {
        /// The operation; `Compare` and `Test` don't write.
        alu: Alu,
        /// Its right side.
        value: u64,
    },
    /// register ← register op memory.
    Combine {
        /// The operation; `Compare` and `Test` don't write.
        alu: Alu,
        /// Its left side and destination.
        register: RegisterPart,
    },
}

/// One access to a device register.
///
/// To carry it out: read the device register if [`reads`](Self::reads), hand
/// the value to [`complete`](Self::complete), write what that returns, and go
/// on `len` bytes further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioAccess {
    /// What is to be done.
    pub operation: Operation,
    /// Width of the access to the device.
    pub width: Width,
    /// Bytes of the instruction.
    pub len: u64,
}

impl MmioAccess {
    /// Whether the device register is read.
    #[must_use]
    pub const fn reads(&self) -> bool {
        !matches!(self.operation, Operation::Store { .. })
    }

    /// Does the processor's part of the access, given the value that the
    /// device register had (any value if it is not read), and returns the
    /// value to be written to it, if any. The instruction pointer is not
    /// advanced.
    #[must_use = "the value has to be written to the device"]
    pub fn complete(&self, registers: &mut Registers, loaded: u64) -> Option<u64> {
        let loaded = loaded & self.width.mask();
        match self.operation {
            Operation::Load { to, extension } => {
                let value = match extension {
                    Extension::Zero => loaded,
                    Extension::Sign => sign_extend(loaded, self.width),
                };
                to.set(registers, value);
                None
            }
            Operation::Store { value } => Some(value),
            Operation::Exchange { register } => {
                let value = register.get(registers);
                register.set(registers, loaded);
                Some(value)
            }
            Operation::Update { alu, value } => alu.run(registers, self.width, loaded, value),
            Operation::Combine { alu, register } => {
                let left = register.get(registers);
                if let Some(result) = alu.run(registers, self.width, left, loaded) {
                    register.set(registers, result);
                }
                None
            }
        }
    }
}

/// Decodes the instruction in `bytes`, which may be followed by others.
/// `registers` gives the values that it stores.
///
/// # Errors
/// If the bytes are no instruction, not a whole one, or one that is not
/// emulated.
pub fn decode(
    bytes: &[u8],
    rip: u64,
    bitness: Bitness,
    registers: &Registers,
) -> Result<MmioAccess, DecodeError> {
    let instruction = instruction(bytes, rip, bitness)?;
    access(&instruction, registers).ok_or(DecodeError::Unsupported { rip })
}

/// The length of the instruction in `bytes`, which may be followed by others;
/// `None` if they are none, or not a whole one.
#[must_use]
pub fn length(bytes: &[u8], bitness: Bitness) -> Option<u64> {
    Some(len(&instruction(bytes, 0, bitness).ok()?))
}

/// The general-purpose register of a move to or from a control or debug
/// register, and the instruction's length; `None` if it is something else.
#[must_use]
pub fn mov_special(bytes: &[u8], bitness: Bitness) -> Option<(Gpr, u64)> {
    let instruction = instruction(bytes, 0, bitness).ok()?;
    let is_special = |name: Name| name.is_cr() || name.is_dr();
    let register = match (instruction.op0_register(), instruction.op1_register()) {
        (special, register) | (register, special) if is_special(special) => register,
        _ => return None,
    };
    Some((gpr(register.full_register())?, len(&instruction)))
}

/// What an INS or OUTS does with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StringPort {
    /// Whether RCX counts.
    pub repeats: bool,
    /// The bits of RSI, RDI and RCX that count.
    pub mask: u64,
    /// The segment of the memory.
    pub segment: StringSegment,
}

/// A segment whose base the exit knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the architecture's")]
pub enum StringSegment {
    Es,
    Cs,
    Ss,
    Ds,
}

/// The INS or OUTS in `bytes`; `None` if it is something else, or its memory
/// is in FS or GS.
#[must_use]
pub fn string_port(bytes: &[u8], bitness: Bitness) -> Option<StringPort> {
    let instruction = instruction(bytes, 0, bitness).ok()?;
    let memory = match instruction.mnemonic() {
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => instruction.op0_kind(),
        Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => instruction.op1_kind(),
        _ => return None,
    };
    let (mask, segment) = match memory {
        OpKind::MemoryESDI => (0xffff, Name::ES),
        OpKind::MemoryESEDI => (0xffff_ffff, Name::ES),
        OpKind::MemoryESRDI => (u64::MAX, Name::ES),
        OpKind::MemorySegSI => (0xffff, instruction.memory_segment()),
        OpKind::MemorySegESI => (0xffff_ffff, instruction.memory_segment()),
        OpKind::MemorySegRSI => (u64::MAX, instruction.memory_segment()),
        _ => return None,
    };
    Some(StringPort {
        repeats: instruction.has_rep_prefix() || instruction.has_repne_prefix(),
        mask,
        segment: match segment {
            Name::ES => StringSegment::Es,
            Name::CS => StringSegment::Cs,
            Name::SS => StringSegment::Ss,
            Name::DS => StringSegment::Ds,
            _ => return None,
        },
    })
}

fn len(instruction: &Instruction) -> u64 {
    instruction.next_ip().wrapping_sub(instruction.ip())
}

fn instruction(bytes: &[u8], rip: u64, bitness: Bitness) -> Result<Instruction, DecodeError> {
    let bits = match bitness {
        Bitness::Bits16 => 16,
        Bitness::Bits32 => 32,
        Bitness::Bits64 => 64,
    };
    let options = DecoderOptions::AMD;
    let mut decoder = Decoder::with_ip(bits, bytes, rip, options);
    let instruction = decoder.decode();
    match decoder.last_error() {
        DecoderError::None => Ok(instruction),
        DecoderError::NoMoreBytes => Err(DecodeError::Truncated { rip }),
        _ => Err(DecodeError::Invalid { rip }),
    }
}

fn access(instruction: &Instruction, registers: &Registers) -> Option<MmioAccess> {
    if instruction.op_count() != 2 {
        return None;
    }
    let width = Width::from_bytes(instruction.memory_size().size())?;
    let operation = match (instruction.op0_kind(), instruction.op1_kind()) {
        (OpKind::Memory, _) => to_memory(instruction, width, registers)?,
        (OpKind::Register, OpKind::Memory) => {
            let register = register_part(instruction.op0_register())?;
            from_memory(instruction.mnemonic(), register)?
        }
        _ => return None,
    };
    // Of the known operations only extending loads have operands of
    // different widths; the decoder guarantees it, and `complete` needs it.
    let fits = match operation {
        Operation::Load { to, .. } => to.width.bytes() >= width.bytes(),
        Operation::Exchange { register } | Operation::Combine { register, .. } => {
            register.width == width
        }
        Operation::Store { .. } | Operation::Update { .. } => true,
    };
    fits.then_some(MmioAccess {
        operation,
        width,
        len: len(instruction),
    })
}

/// The operation of an instruction whose first operand is in memory.
fn to_memory(instruction: &Instruction, width: Width, registers: &Registers) -> Option<Operation> {
    let source = match instruction.op1_kind() {
        OpKind::Register => Some(register_part(instruction.op1_register())?),
        _ => None,
    };
    let value = match source {
        Some(register) => register.get(registers),
        None => instruction.try_immediate(1).ok()?,
    } & width.mask();
    Some(match instruction.mnemonic() {
        Mnemonic::Mov | Mnemonic::Movnti => Operation::Store { value },
        Mnemonic::Xchg => Operation::Exchange { register: source? },
        mnemonic => Operation::Update {
            alu: alu(mnemonic)?,
            value,
        },
    })
}

/// The operation of an instruction that has a register first and memory
/// second.
fn from_memory(mnemonic: Mnemonic, register: RegisterPart) -> Option<Operation> {
    let load = |extension| Operation::Load {
        to: register,
        extension,
    };
    Some(match mnemonic {
        Mnemonic::Mov | Mnemonic::Movzx => load(Extension::Zero),
        Mnemonic::Movsx | Mnemonic::Movsxd => load(Extension::Sign),
        Mnemonic::Xchg => Operation::Exchange { register },
        mnemonic => Operation::Combine {
            alu: alu(mnemonic)?,
            register,
        },
    })
}

fn alu(mnemonic: Mnemonic) -> Option<Alu> {
    Some(match mnemonic {
        Mnemonic::Add => Alu::Add,
        Mnemonic::Sub => Alu::Sub,
        Mnemonic::And => Alu::And,
        Mnemonic::Or => Alu::Or,
        Mnemonic::Xor => Alu::Xor,
        Mnemonic::Cmp => Alu::Compare,
        Mnemonic::Test => Alu::Test,
        _ => return None,
    })
}

fn register_part(name: Name) -> Option<RegisterPart> {
    if !name.is_gpr() {
        return None;
    }
    let position = match name {
        Name::AH | Name::CH | Name::DH | Name::BH => Position::HighByte,
        _ => Position::Low,
    };
    Some(RegisterPart {
        register: gpr(name.full_register())?,
        width: Width::from_bytes(name.size())?,
        position,
    })
}

fn gpr(full: Name) -> Option<Gpr> {
    Gpr::from_number(u8::try_from(full.number()).ok()?)
}

impl RegisterPart {
    const fn shift(self) -> u32 {
        match self.position {
            Position::Low => 0,
            Position::HighByte => 8,
        }
    }

    fn get(self, registers: &Registers) -> u64 {
        (registers.get(self.register) >> self.shift()) & self.width.mask()
    }

    fn set(self, registers: &mut Registers, value: u64) {
        let value = value & self.width.mask();
        let kept = match self.width {
            // A write of the low half clears the high half.
            Width::Dword | Width::Qword => 0,
            Width::Byte | Width::Word => {
                registers.get(self.register) & !(self.width.mask() << self.shift())
            }
        };
        registers.set(self.register, kept | (value << self.shift()));
    }
}

impl Alu {
    /// Computes, sets the flags, and returns the result unless it is only
    /// computed for the flags. Both sides fit the width.
    fn run(self, registers: &mut Registers, width: Width, left: u64, right: u64) -> Option<u64> {
        let sign = width.mask() ^ (width.mask() >> 1);
        let (result, carry, overflow) = match self {
            Self::Add => {
                let sum = left.wrapping_add(right) & width.mask();
                (sum, sum < left, (left ^ sum) & (right ^ sum) & sign != 0)
            }
            Self::Sub | Self::Compare => {
                let difference = left.wrapping_sub(right) & width.mask();
                let overflow = (left ^ right) & (left ^ difference) & sign != 0;
                (difference, left < right, overflow)
            }
            Self::And | Self::Test => (left & right, false, false),
            Self::Or => (left | right, false, false),
            Self::Xor => (left ^ right, false, false),
        };
        let adjust = match self {
            Self::Add | Self::Sub | Self::Compare => (left ^ right ^ result) & ADJUST != 0,
            // Undefined; processors clear it.
            Self::And | Self::Test | Self::Or | Self::Xor => false,
        };
        let [low, ..] = result.to_le_bytes();
        let mut flags = registers.rflags & !ARITHMETIC_FLAGS;
        for (flag, is_set) in [
            (CARRY, carry),
            (PARITY, low.count_ones().is_multiple_of(2)),
            (ADJUST, adjust),
            (ZERO, result == 0),
            (SIGN, result & sign != 0),
            (OVERFLOW, overflow),
        ] {
            if is_set {
                flags |= flag;
            }
        }
        registers.rflags = flags;
        match self {
            Self::Compare | Self::Test => None,
            Self::Add | Self::Sub | Self::And | Self::Or | Self::Xor => Some(result),
        }
    }
}

fn sign_extend(value: u64, width: Width) -> u64 {
    let sign = width.mask() ^ (width.mask() >> 1);
    (value ^ sign).wrapping_sub(sign)
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::IcedError;
    use iced_x86::code_asm::*;

    const RIP: u64 = 0xffff_ffff_8100_0000;

    /// Registers that all differ, each byte of each of them.
    fn registers() -> Registers {
        let mut registers = Registers::default();
        for (index, value) in registers.gpr.iter_mut().enumerate() {
            let first = u8::try_from(index * 8).expect("small");
            *value = u64::from_le_bytes(core::array::from_fn(|byte| {
                first + u8::try_from(byte).expect("small") + 0x41
            }));
        }
        registers.rip = RIP;
        registers.rflags = 0x246;
        registers
    }

    fn assemble(code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
        let mut assembler = CodeAssembler::new(64).expect("a legal bitness");
        code(&mut assembler).expect("encodable");
        assembler.assemble(RIP).expect("encodable")
    }

    /// Runs an instruction against a device register that holds `device`;
    /// returns the registers after it and what was written to the device.
    fn run(
        device: u64,
        code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> (MmioAccess, Registers, Option<u64>) {
        let mut bytes = assemble(code);
        let len = bytes.len();
        // What follows must not matter.
        bytes.resize(15, 0xcc);
        let mut after = registers();
        let access = decode(&bytes, RIP, Bitness::Bits64, &after).expect("supported");
        assert_eq!(access.len, len as u64);
        let written = access.complete(&mut after, device);
        (access, after, written)
    }

    /// As `run` for a load into one register; returns its new value and the
    /// width of the access, and checks that no other register changed.
    fn load(
        register: Gpr,
        device: u64,
        code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> (u64, Width) {
        let (access, mut after, written) = run(device, code);
        assert!(access.reads());
        assert_eq!(written, None);
        let value = after.get(register);
        after.set(register, registers().get(register));
        assert_eq!(after, registers());
        (value, access.width)
    }

    /// As `run` for a plain store; returns the value and its width.
    fn store(code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> (u64, Width) {
        let (access, after, written) = run(0xdead, code);
        assert!(!access.reads());
        assert_eq!(after, registers());
        (written.expect("a store"), access.width)
    }

    const DEVICE: u64 = 0xf1f2_f3f4_f5f6_f7f8;

    #[test]
    fn loads_of_each_width_fill_the_register_as_the_processor_does() {
        let old = registers().get(Gpr::Rcx);
        let cases = [
            (
                load(Gpr::Rcx, DEVICE, |a| a.mov(cl, byte_ptr(rax))),
                ((old & !0xff) | 0xf8, Width::Byte),
            ),
            (
                load(Gpr::Rcx, DEVICE, |a| a.mov(ch, byte_ptr(rax))),
                ((old & !0xff00) | 0xf800, Width::Byte),
            ),
            (
                load(Gpr::Rcx, DEVICE, |a| a.mov(cx, word_ptr(rax + rbx * 4))),
                ((old & !0xffff) | 0xf7f8, Width::Word),
            ),
            (
                load(Gpr::Rcx, DEVICE, |a| a.mov(ecx, dword_ptr(rax + 0x10))),
                (0xf5f6_f7f8, Width::Dword),
            ),
            (
                load(Gpr::Rcx, DEVICE, |a| a.mov(rcx, qword_ptr(rax + 0x1000))),
                (DEVICE, Width::Qword),
            ),
        ];
        for (got, expected) in cases {
            assert_eq!(got, expected);
        }
    }

    #[test]
    fn byte_registers_with_and_without_rex_are_told_apart() {
        let old = registers();
        let low = load(Gpr::Rsp, 0x77, |a| a.mov(spl, byte_ptr(rax)));
        assert_eq!(
            low,
            ((old.get(Gpr::Rsp) & !0xff) | 0x77, Width::Byte),
            "SPL"
        );
        let high = load(Gpr::Rax, 0x77, |a| a.mov(ah, byte_ptr(rax)));
        assert_eq!(
            high,
            ((old.get(Gpr::Rax) & !0xff00) | 0x7700, Width::Byte),
            "AH"
        );
        let stores = [
            (store(|a| a.mov(byte_ptr(rax), dil)), old.get(Gpr::Rdi)),
            (store(|a| a.mov(byte_ptr(rax), bh)), old.get(Gpr::Rbx) >> 8),
            (store(|a| a.mov(byte_ptr(rax), r15b)), old.get(Gpr::R15)),
        ];
        for (got, expected) in stores {
            assert_eq!(got, (expected & 0xff, Width::Byte));
        }
    }

    #[test]
    fn extending_loads_have_the_width_of_memory() {
        let cases = [
            (
                load(Gpr::Rdx, DEVICE, |a| a.movzx(edx, byte_ptr(rax))),
                (0xf8, Width::Byte),
            ),
            (
                load(Gpr::Rdx, DEVICE, |a| a.movzx(rdx, word_ptr(rax))),
                (0xf7f8, Width::Word),
            ),
            (
                load(Gpr::R9, DEVICE, |a| a.movsx(r9d, byte_ptr(rax))),
                (0xffff_fff8, Width::Byte),
            ),
            (
                load(Gpr::R9, DEVICE, |a| a.movsx(r9, word_ptr(rax))),
                (0xffff_ffff_ffff_f7f8, Width::Word),
            ),
            (
                load(Gpr::R9, DEVICE, |a| a.movsxd(r9, dword_ptr(rax))),
                (0xffff_ffff_f5f6_f7f8, Width::Dword),
            ),
            (
                load(Gpr::R9, 0x7f, |a| a.movsx(r9, byte_ptr(rax))),
                (0x7f, Width::Byte),
            ),
        ];
        for (got, expected) in cases {
            assert_eq!(got, expected);
        }
        let (word, _) = load(Gpr::Rdx, 0x80, |a| a.movsx(dx, byte_ptr(rax)));
        assert_eq!(word, (registers().get(Gpr::Rdx) & !0xffff) | 0xff80);
    }

    #[test]
    fn stores_carry_the_register_or_the_extended_immediate() {
        let r8_value = registers().get(Gpr::R8);
        let cases = [
            (
                store(|a| a.mov(word_ptr(rax), r8w)),
                (r8_value & 0xffff, Width::Word),
            ),
            (
                store(|a| a.mov(dword_ptr(rax), r8d)),
                (r8_value & 0xffff_ffff, Width::Dword),
            ),
            (
                store(|a| a.mov(qword_ptr(rax), r8)),
                (r8_value, Width::Qword),
            ),
            (
                store(|a| a.movnti(dword_ptr(rax), r8d)),
                (r8_value & 0xffff_ffff, Width::Dword),
            ),
            (
                store(|a| a.mov(byte_ptr(rax), 0x85_u32)),
                (0x85, Width::Byte),
            ),
            (
                store(|a| a.mov(word_ptr(rax), 0x8765_u32)),
                (0x8765, Width::Word),
            ),
            (
                store(|a| a.mov(dword_ptr(rax), 0x8765_4321_u32)),
                (0x8765_4321, Width::Dword),
            ),
            (
                store(|a| a.mov(qword_ptr(rax), -2)),
                (u64::MAX - 1, Width::Qword),
            ),
        ];
        for (got, expected) in cases {
            assert_eq!(got, expected);
        }
    }

    #[test]
    fn absolute_accumulator_forms_are_known() {
        let al_store = [
            0xa2, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0, // mov [0xfec00000], al
        ];
        let access = decode(&al_store, RIP, Bitness::Bits64, &registers()).expect("supported");
        assert_eq!(access.width, Width::Byte);
        assert_eq!(access.operation, Operation::Store { value: 0x41 });
        let eax_load = [0xa1, 0, 0, 0xc0, 0xfe]; // mov eax, [0xfec00000]
        let access = decode(&eax_load, 0x1000, Bitness::Bits32, &registers()).expect("supported");
        assert_eq!((access.width, access.len), (Width::Dword, 5));
        let mut after = registers();
        assert_eq!(access.complete(&mut after, DEVICE), None);
        assert_eq!(after.get(Gpr::Rax), 0xf5f6_f7f8);
    }

    #[test]
    fn sixteen_bit_code_defaults_to_words() {
        let load = [0x8b, 0x07]; // mov ax, [bx]
        let access = decode(&load, 0x10, Bitness::Bits16, &registers()).expect("supported");
        assert_eq!((access.width, access.len), (Width::Word, 2));
        let wide = [0x66, 0x67, 0x89, 0x08]; // mov [eax], ecx
        let access = decode(&wide, 0x10, Bitness::Bits16, &registers()).expect("supported");
        assert_eq!((access.width, access.len), (Width::Dword, 4));
    }

    #[test]
    fn exchanges_swap_in_either_encoding() {
        let old = registers().get(Gpr::Rsi);
        let (access, after, written) = run(DEVICE, |a| a.xchg(dword_ptr(rax), esi));
        assert!(access.reads());
        assert_eq!(written, Some(old & 0xffff_ffff));
        assert_eq!(after.get(Gpr::Rsi), 0xf5f6_f7f8);
    }

    #[test]
    fn updates_write_the_device_and_the_flags_and_no_register() {
        let kept = 0x246 & !ARITHMETIC_FLAGS;
        let mut cases = Vec::new();
        cases.push((
            run(0xf0, |a| a.or(byte_ptr(rax), 0x0f)),
            Some(0xff),
            SIGN | PARITY,
        ));
        cases.push((
            run(0xf0, |a| a.and(byte_ptr(rax), 0x0f)),
            Some(0),
            ZERO | PARITY,
        ));
        cases.push((
            run(0x8000_0000, |a| a.add(dword_ptr(rax), -0x8000_0000)),
            Some(0),
            ZERO | PARITY | CARRY | OVERFLOW,
        ));
        cases.push((
            run(0x10, |a| a.lock().sub(qword_ptr(rax), 0x11)),
            Some(u64::MAX),
            SIGN | PARITY | CARRY | ADJUST,
        ));
        cases.push((
            run(0x8081_8283, |a| a.xor(word_ptr(rax), cx)),
            Some(0x8283 ^ (registers().get(Gpr::Rcx) & 0xffff)),
            SIGN | PARITY,
        ));
        cases.push((run(0x80, |a| a.test(byte_ptr(rax), 0x80_u32)), None, SIGN));
        cases.push((run(5, |a| a.cmp(dword_ptr(rax), 5)), None, ZERO | PARITY));
        for ((access, after, written), expected, flags) in cases {
            assert!(access.reads());
            assert_eq!(written, expected, "{access:?}");
            assert_eq!(after.gpr, registers().gpr, "{access:?}");
            assert_eq!(after.rflags, kept | flags, "{access:?}");
        }
    }

    #[test]
    fn register_results_combine_in_the_right_order() {
        let old = registers().get(Gpr::Rbx);
        let (_, after, written) = run(1, |a| a.sub(rbx, qword_ptr(rax)));
        assert_eq!((after.get(Gpr::Rbx), written), (old - 1, None));
        let (_, after, written) = run(u64::MAX, |a| a.cmp(ebx, dword_ptr(rax)));
        assert_eq!((after.get(Gpr::Rbx), written), (old, None));
        assert_eq!(after.rflags & (CARRY | ZERO), CARRY, "EBX is below");
        let (_, after, _) = run(0xff, |a| a.and(ebx, dword_ptr(rax)));
        assert_eq!(after.get(Gpr::Rbx), old & 0xff, "zero-extended");
    }

    #[test]
    fn prefixes_count_as_part_of_the_instruction() {
        let bytes = [0x2e, 0x66, 0x67, 0x44, 0x89, 0x00, 0x90];
        let access = decode(&bytes, RIP, Bitness::Bits64, &registers()).expect("supported");
        assert_eq!((access.len, access.width), (6, Width::Word));
    }

    #[test]
    fn what_is_not_emulated_is_refused() {
        type Code = fn(&mut CodeAssembler) -> Result<(), IcedError>;
        let cases: [Code; 12] = [
            |a| a.nop(),
            |a| a.mov(eax, ebx),
            |a| a.push(qword_ptr(rax)),
            |a| a.call(qword_ptr(rax)),
            |a| a.movsb(),
            |a| a.stosd(),
            |a| a.movups(xmm0, xmmword_ptr(rax)),
            |a| a.movd(dword_ptr(rax), xmm0),
            |a| a.mov(word_ptr(rax), ds),
            |a| a.lea(eax, dword_ptr(rax)),
            |a| a.shl(dword_ptr(rax), 1),
            |a| a.lidt(ptr(rax)),
        ];
        for (number, case) in cases.into_iter().enumerate() {
            let bytes = assemble(case);
            assert_eq!(
                decode(&bytes, RIP, Bitness::Bits64, &registers()),
                Err(DecodeError::Unsupported { rip: RIP }),
                "case {number}"
            );
        }
    }

    #[test]
    fn cut_and_illegal_instructions_are_told_apart() {
        let whole = assemble(|a| a.mov(dword_ptr(rax + 0x1234), 0x1234_5678));
        for len in 0..whole.len() {
            assert_eq!(
                decode(&whole[..len], RIP, Bitness::Bits64, &registers()),
                Err(DecodeError::Truncated { rip: RIP })
            );
        }
        for bytes in [&[0x0f, 0x0b][..], &[0x06], &[0xf0, 0x8b, 0x00]] {
            let result = decode(bytes, RIP, Bitness::Bits64, &registers());
            assert!(result.is_err(), "{bytes:x?}: {result:?}");
        }
        let too_long = [0x66; 15];
        let result = decode(&too_long, RIP, Bitness::Bits64, &registers());
        assert!(result.is_err());
    }

    #[test]
    fn prefixes_count_for_the_length() {
        let long = |code: &[u8]| length(code, Bitness::Bits64);
        assert_eq!(long(&[0x48, 0x0f, 0xa2, 0x90]), Some(3), "REX.W CPUID");
        assert_eq!(long(&[0x3e, 0x3e, 0x0f, 0xa2]), Some(4), "DS DS CPUID");
        assert_eq!(long(&[0xf3, 0x0f, 0x09, 0x90]), Some(3), "WBNOINVD");
        assert_eq!(long(&[0x66, 0xf4]), Some(2), "HLT");
        assert_eq!(long(&[0x48, 0x0f]), None, "cut off");
        let inc_eax = length(&[0x40, 0x0f, 0xa2], Bitness::Bits32);
        assert_eq!(inc_eax, Some(1), "no REX here");
    }

    #[test]
    fn moves_to_and_from_special_registers_name_their_register() {
        let long = |code: &[u8]| mov_special(code, Bitness::Bits64);
        assert_eq!(long(&[0x0f, 0x23, 0xf8]), Some((Gpr::Rax, 3)));
        assert_eq!(long(&[0x41, 0x0f, 0x21, 0xff]), Some((Gpr::R15, 4)));
        assert_eq!(long(&[0x44, 0x0f, 0x22, 0xc3]), Some((Gpr::Rbx, 4)), "CR8");
        assert_eq!(long(&[0x0f, 0xa2, 0x90]), None);
    }

    #[test]
    fn string_instructions_of_ports_tell_their_memory() {
        let all = |repeats, mask, segment| {
            Some(StringPort {
                repeats,
                mask,
                segment,
            })
        };
        let (wide, dword, word) = (u64::MAX, 0xffff_ffff, 0xffff);
        for (bytes, bitness, expected) in [
            (
                &[0x6c][..],
                Bitness::Bits64,
                all(false, wide, StringSegment::Es),
            ),
            (
                &[0xf3, 0x6e],
                Bitness::Bits64,
                all(true, wide, StringSegment::Ds),
            ),
            (
                &[0x67, 0x6f],
                Bitness::Bits64,
                all(false, dword, StringSegment::Ds),
            ),
            (
                &[0xf2, 0x66, 0x6d],
                Bitness::Bits32,
                all(true, dword, StringSegment::Es),
            ),
            (
                &[0x2e, 0x6e],
                Bitness::Bits16,
                all(false, word, StringSegment::Cs),
            ),
            (&[0x64, 0x6e], Bitness::Bits64, None),
            (&[0xec], Bitness::Bits64, None),
            (&[0xf3], Bitness::Bits64, None),
        ] {
            assert_eq!(string_port(bytes, bitness), expected, "{bytes:x?}");
        }
    }
}
