//! Images that run without a kernel: a few dozen instructions each, as
//! multiboot or PVH images in 32-bit code.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use viaduct_tests::{Bench, Finished};

/// Where the image is loaded.
const LOAD: u32 = 0x10_0000;
/// Where in the file the boot protocol's mark is, and the code.
const MARK: usize = 0x80;
const CODE: usize = 0xc0;

/// How an image says that it can be booted.
#[derive(Clone, Copy)]
enum Mark {
    Multiboot,
    Pvh,
}

/// An ELF32 file with this code.
fn image(mark: Mark, code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
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
fn print(code: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut again, mut done) = (code.create_label(), code.create_label());
    code.mov(edx, 0x3f8)?;
    code.set_label(&mut again)?;
    code.lodsb()?;
    code.test(al, al)?;
    code.jz(done)?;
    code.out(dx, al)?;
    code.jmp(again)?;
    code.set_label(&mut done)?;
    code.nop()
}

/// Writes EAX to the exit port.
fn exit(code: &mut CodeAssembler) -> Result<(), IcedError> {
    code.mov(edx, 0xf4)?;
    code.out(dx, eax)?;
    code.hlt()
}

fn run(bench: &Bench, image: &[u8], words: &[&str]) -> Finished {
    let path = bench.file("image", image);
    bench
        .line(["run", "--memory", "128M", "--guest"])
        .words([path])
        .words(words)
        .finish()
}

#[test]
fn a_multiboot_image_gets_its_words_its_module_and_the_count_of_cpus() {
    let image = image(Mark::Multiboot, |code| {
        let mut wrong = code.create_label();
        code.mov(ecx, eax)?;
        code.mov(eax, 99)?;
        code.cmp(ecx, 0x2bad_b002_u32)?;
        code.jne(wrong)?;
        code.mov(esi, dword_ptr(ebx + 16))?;
        print(code)?;
        // The only module, then its words.
        code.mov(edi, dword_ptr(ebx + 24))?;
        code.mov(esi, dword_ptr(edi))?;
        print(code)?;
        code.mov(esi, dword_ptr(edi + 8))?;
        print(code)?;
        code.mov(eax, 5)?;
        code.mov(edx, 0x510)?;
        code.out(dx, ax)?;
        code.inc(edx)?;
        code.xor(eax, eax)?;
        code.in_(al, dx)?;
        code.set_label(&mut wrong)?;
        exit(code)
    });
    let bench = Bench::new();
    let module = bench.file("module", b"<module>\0");
    let module = format!("{} its words", module.display());
    let words = ["--cores", "2", "--module", &module, "--", "two", "words"];
    let done = run(&bench, &image, &words);
    assert_eq!(done.status, 2 << 1 | 1, "{}", done.err());
    let path = bench.path("image");
    let expected = format!("{} two words<module>its words", path.display());
    assert_eq!(done.out(), expected);
    bench.assert_nothing_left();
}

#[test]
fn a_pvh_image_gets_its_words_and_switches_off() {
    let image = image(Mark::Pvh, |code| {
        let mut wrong = code.create_label();
        code.mov(eax, 99)?;
        code.cmp(dword_ptr(ebx), 0x336e_c578)?;
        code.jne(wrong)?;
        code.mov(esi, dword_ptr(ebx + 24))?;
        print(code)?;
        code.mov(edx, 0x600)?;
        code.mov(al, 0x34)?;
        code.out(dx, al)?;
        code.set_label(&mut wrong)?;
        exit(code)
    });
    let done = run(
        &Bench::new(),
        &image,
        &["--cores", "1", "--append", "quiet"],
    );
    assert_eq!(
        (done.status, done.out().as_str()),
        (0, "quiet"),
        "{}",
        done.err()
    );
}

/// Starts the other vCPUs through the APIC's window. Each adds to a word; when
/// all of them have, the exit value is that word, less `expected`.
fn start_others(
    others: u32,
    expected: u32,
) -> impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError> {
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

#[test]
fn a_second_vcpu_is_started_through_the_window() {
    let image = image(Mark::Multiboot, start_others(1, 0));
    let done = run(&Bench::new(), &image, &["--cores", "2"]);
    assert_eq!(done.status, 1 << 1 | 1, "{}", done.err());
}

#[test]
fn so_is_one_on_another_node() {
    let image = image(Mark::Multiboot, start_others(1, 0));
    let done = run(&Bench::new(), &image, &["--nodes", "2", "--cores", "1"]);
    assert_eq!(done.status, 1 << 1 | 1, "{}", done.err());
}

#[test]
fn four_vcpus_lie_on_two_nodes() {
    let image = image(Mark::Multiboot, start_others(3, 0));
    let done = run(&Bench::new(), &image, &["--nodes", "2", "--cores", "2"]);
    assert_eq!(done.status, 3 << 1 | 1, "{}", done.err());
}

#[test]
fn a_tree_of_unit_tests_runs_on_two_nodes() {
    let bench = Bench::new();
    let folder = bench.path("tree/x86");
    std::fs::create_dir_all(&folder).expect("writable");
    let write = |name: &str, bytes: &[u8]| {
        std::fs::write(folder.join(name), bytes).expect("writable");
    };
    write("four.flat", &image(Mark::Multiboot, start_others(3, 3)));
    write("wrong.flat", &image(Mark::Multiboot, start_others(3, 2)));
    write(
        "unittests.cfg",
        b"[four]\nfile = four.flat\nsmp = 4\n\n[wrong]\nfile = wrong.flat\nsmp = 4\n",
    );
    let tap = bench.path("tree.tap");
    let done = bench
        .line(["kvm-unit-tests", "--nodes", "2", "--no-reference", "--tap"])
        .words([&tap, &bench.path("tree")])
        .finish();
    assert_eq!(done.status, 1, "{}", done.err());
    let text = std::fs::read_to_string(&tap).expect("written");
    let lines: Vec<_> = text.lines().skip(2).collect();
    assert_eq!(lines[0], "ok 1 - four", "{text}");
    assert!(lines[1].starts_with("not ok 2 - wrong"), "{text}");
    bench.assert_nothing_left();
}

#[test]
fn a_guest_that_prints_without_end_is_ended() {
    let image = image(Mark::Multiboot, |code| {
        let mut again = code.create_label();
        code.mov(edx, 0x3f8)?;
        code.set_label(&mut again)?;
        code.out(dx, al)?;
        code.jmp(again)
    });
    let done = run(&Bench::new(), &image, &["--cores", "1", "--timeout", "2"]);
    let said = done.err();
    assert_eq!((done.status, said.lines().count()), (124, 1), "{said}");
    assert!(said.contains("vCPU 0 was at"), "{said}");
}

#[test]
fn the_old_timer_ticks_at_the_old_controller() {
    let image = image(Mark::Multiboot, |code| {
        let mut again = code.create_label();
        // One tick after some 10 ms; then wait for the request.
        for (port, value) in [
            (0x43_u32, 0x30_u32),
            (0x40, 0x9b),
            (0x40, 0x2e),
            (0x20, 0x0a),
        ] {
            code.mov(eax, value)?;
            code.out(port, al)?;
        }
        code.set_label(&mut again)?;
        code.in_(al, 0x20_u32)?;
        code.test(al, 1)?;
        code.jz(again)?;
        code.movzx(eax, al)?;
        exit(code)
    });
    let done = run(
        &Bench::new(),
        &image,
        &["--cores", "1", "--platform", "legacy"],
    );
    assert_eq!(done.status, 3, "{}", done.err());
}

#[test]
fn a_guest_that_hangs_is_ended_with_its_place() {
    let image = image(Mark::Multiboot, |code| {
        let mut again = code.create_label();
        code.set_label(&mut again)?;
        code.in_(al, 0x80_u32)?;
        code.jmp(again)
    });
    let done = run(&Bench::new(), &image, &["--cores", "1", "--timeout", "2"]);
    let said = done.err();
    assert_eq!(done.status, 124, "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    for fact in ["within 2 s", "vCPU 0 was at 0x1000c", "exit_io"] {
        assert!(said.contains(fact), "no {fact:?} in {said}");
    }
}

#[test]
fn broken_images_are_refused_in_a_line() {
    let sound = image(Mark::Multiboot, |code| code.hlt());
    let mut other = sound.clone();
    other[18] = 183;
    let mut high = sound.clone();
    high[64..68].copy_from_slice(&[0, 0, 0, 0xf0]);
    let bench = Bench::new();
    for (image, reason) in [
        (&sound[..sound.len() - 1], "truncated"),
        (&other, "another processor"),
        (&high, "does not fit at 0xf0000000"),
    ] {
        let done = run(&bench, image, &["--cores", "1"]);
        let said = done.err();
        assert_eq!((done.status, said.lines().count()), (125, 1), "{said}");
        assert!(said.contains(reason), "no {reason:?} in {said}");
    }
    for words in [&["--initramfs", "/dev/null"][..], &["--tty"]] {
        assert_eq!(run(&bench, &sound, words).status, 125);
    }
    bench.assert_nothing_left();
}
