//! Images that run without a kernel: a few dozen instructions each, as
//! multiboot or PVH images in 32-bit code.

use iced_x86::code_asm::{CodeAssembler, al, dword_ptr, dx, eax, edx, esi, esp, word_ptr};

use crate::guest::Assembled;

/// Where the image is loaded.
const LOAD: u32 = 0x10_0000;
/// Where in the file the boot protocol's mark is, and the code.
const MARK: usize = 0x80;
const CODE: usize = 0xc0;
/// Memory that nothing else uses.
const STACK: u32 = 0x9000;
const SERIAL: u32 = 0x3f8;
const EXIT: u32 = 0xf4;

/// How an image says that it can be booted.
#[derive(Clone, Copy, Debug)]
pub enum Mark {
    /// By a multiboot 1 header.
    Multiboot,
    /// By a PVH note.
    Pvh,
}

/// An ELF32 file with this code.
///
/// # Panics
/// If the code can't be assembled.
#[must_use]
pub fn image(mark: Mark, code: impl FnOnce(&mut CodeAssembler) -> Assembled) -> Vec<u8> {
    let entry = LOAD + 0xc0;
    let mut assembler = CodeAssembler::new(32).expect("there is such code");
    code(&mut assembler).expect("legal");
    let code = assembler.assemble(entry.into()).expect("legal");
    let mark = match mark {
        Mark::Multiboot => [0x1bad_b002, 0, 0_u32.wrapping_sub(0x1bad_b002), 0, 0],
        Mark::Pvh => [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), entry],
    };
    let len = u32::try_from(CODE + code.len()).expect("small");
    let words =
        |words: &[u32]| -> Vec<u8> { words.iter().flat_map(|word| word.to_le_bytes()).collect() };
    let mut file = b"\x7fELF\x01\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2, 0, 3, 0]);
    file.extend(words(&[1, entry, 52, 0, 0]));
    file.extend([52, 0, 32, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    file.extend(words(&[1, 0, LOAD, LOAD, len, len, 7, 4096]));
    file.extend(words(&[4, 0x80, 0, 0, 20, 20, 4, 4]));
    file.resize(MARK, 0);
    file.extend(words(&mark));
    file.resize(CODE, 0);
    file.extend(code);
    file
}

/// Prints the bytes at ESI up to a zero.
///
/// # Errors
/// If the assembler refuses it.
pub fn print(code: &mut CodeAssembler) -> Assembled {
    let (mut again, mut done) = (code.create_label(), code.create_label());
    code.mov(edx, SERIAL)?;
    code.set_label(&mut again)?;
    code.lodsb()?;
    code.test(al, al)?;
    code.jz(done)?;
    code.out(dx, al)?;
    code.jmp(again)?;
    code.set_label(&mut done)?;
    code.nop()
}

/// Prints a text.
///
/// # Errors
/// If the assembler refuses it.
pub fn say(code: &mut CodeAssembler, text: &str) -> Assembled {
    let mut behind = code.create_label();
    code.mov(esp, STACK)?;
    // The call leaves the text's address there.
    code.call(behind)?;
    code.db(text.as_bytes())?;
    code.db(&[0])?;
    code.set_label(&mut behind)?;
    code.pop(esi)?;
    print(code)
}

/// Writes EAX to the exit port.
///
/// # Errors
/// If the assembler refuses it.
pub fn exit(code: &mut CodeAssembler) -> Assembled {
    code.mov(edx, EXIT)?;
    code.out(dx, eax)?;
    code.hlt()
}

/// Starts the other vCPUs through the APIC's window. Each adds to a word; when
/// all of them have, the exit value is that word, less `expected`.
pub fn start_others(others: u32, expected: u32) -> impl FnOnce(&mut CodeAssembler) -> Assembled {
    const PAGE: u32 = 0x8000;
    move |code| {
        // lock inc word [0x7000]; hlt; jmp $-1, in 16-bit code.
        for (place, word) in (PAGE..).step_by(4).zip([0x0006_fff0_u32, 0xfdeb_f470]) {
            code.mov(dword_ptr(place), word)?;
        }
        code.mov(word_ptr(0x7000), 0)?;
        for command in [0xc_4500, 0xc_4608] {
            code.mov(dword_ptr(0xfee0_0300_u32), command)?;
        }
        let mut again = code.create_label();
        code.set_label(&mut again)?;
        code.pause()?;
        code.movzx(eax, word_ptr(0x7000))?;
        code.cmp(eax, others)?;
        code.jb(again)?;
        code.sub(eax, expected)?;
        exit(code)
    }
}
