//! Images that run without a kernel: a few dozen instructions each, as
//! multiboot or PVH images in 32-bit code.

use iced_x86::code_asm::*;
use viaduct_tests::bare::{Mark, exit, image, print, start_others};
use viaduct_tests::{Bench, Finished};

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

#[test]
fn fw_cfg_tells_the_memory() {
    let image = image(Mark::Multiboot, |code| {
        let mut wrong = code.create_label();
        code.mov(eax, 3)?;
        code.mov(edx, 0x510)?;
        code.out(dx, ax)?;
        code.inc(edx)?;
        for _ in 0..4 {
            code.in_(al, dx)?;
            code.ror(eax, 8)?;
        }
        code.cmp(eax, 128 << 20)?;
        code.mov(eax, 0)?;
        code.je(wrong)?;
        code.mov(eax, 99)?;
        code.set_label(&mut wrong)?;
        exit(code)
    });
    let done = run(&Bench::new(), &image, &["--cores", "1"]);
    assert_eq!(done.status, 1, "{}", done.err());
}

#[test]
fn an_image_may_switch_its_apic_over() {
    let image = image(Mark::Multiboot, |code| {
        let mut wrong = code.create_label();
        code.mov(ecx, 0x1b)?;
        code.rdmsr()?;
        code.test(eax, 1 << 10)?;
        code.mov(ebx, 98)?;
        code.jnz(wrong)?;
        code.or(eax, 1 << 10)?;
        code.wrmsr()?;
        code.mov(ecx, 0x803)?;
        code.rdmsr()?;
        code.movzx(ebx, al)?;
        code.set_label(&mut wrong)?;
        code.mov(eax, ebx)?;
        exit(code)
    });
    let done = run(&Bench::new(), &image, &["--cores", "1"]);
    // Its version by MSR: 10H to 15H for those that are part of a processor.
    assert_eq!(done.status >> 5, 1, "{} {}", done.status, done.err());
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
fn the_old_clocks_are_there_if_wanted() {
    let image = image(Mark::Multiboot, |code| {
        let (mut wrong, mut end) = (code.create_label(), code.create_label());
        // Seconds in decimal digits.
        code.xor(eax, eax)?;
        code.out(0x70_u32, al)?;
        code.in_(al, 0x71_u32)?;
        code.cmp(al, 0x60)?;
        code.jae(wrong)?;
        // The ACPI timer goes on.
        code.mov(edx, 0x608)?;
        code.in_(eax, dx)?;
        code.mov(ecx, eax)?;
        code.in_(eax, dx)?;
        code.cmp(eax, ecx)?;
        code.mov(eax, 0)?;
        code.jne(end)?;
        code.set_label(&mut wrong)?;
        code.mov(eax, 99)?;
        code.set_label(&mut end)?;
        exit(code)
    });
    for (platform, status) in [("legacy", 1), ("lean", 99 << 1 | 1)] {
        let words = ["--cores", "1", "--platform", platform];
        let done = run(&Bench::new(), &image, &words);
        assert_eq!(done.status, status, "{platform}: {}", done.err());
    }
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
    let words = |at: usize, words: &[u32]| {
        let mut image = sound.clone();
        for (at, word) in (at..).step_by(4).zip(words) {
            image[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        image
    };
    let second_segment = 52 + 32;
    let overlapping = [1, 0, 0x10_0010, 0x10_0010, 16, 16, 7, 4096];
    let bench = Bench::new();
    for (image, reason) in [
        (&sound[..sound.len() - 1], "truncated"),
        (&other, "another processor"),
        (&high, "does not fit at 0xf0000000"),
        (&words(72, &[0xe000_0000]), "low memory ends at 0x8000000"),
        (&words(second_segment, &overlapping), "overlaps another"),
        (&words(24, &[0]), "entry point 0x0 is in no segment"),
        (&words(28, &[0xffff_fff0]), "truncated"),
        (&words(44, &[40]), "40 program headers"),
        (&words(68, &[u32::MAX]), "truncated"),
        (&words(72, &[1]), "larger in the file than in memory"),
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
