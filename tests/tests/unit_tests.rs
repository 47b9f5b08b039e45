//! `viaduct kvm-unit-tests`, on trees of a few images of our own.

use std::path::PathBuf;

use iced_x86::code_asm::*;
use viaduct_tests::bare::{Mark, exit, image, print, say, start_others};
use viaduct_tests::guest::Assembled;
use viaduct_tests::{Bench, Finished};

/// What the test library's `exit` writes when there is nothing to test.
const SKIPPED: u32 = 77 >> 1;

/// A tree with these images and this configuration.
fn tree(bench: &Bench, images: &[(&str, Vec<u8>)], config: &str) -> PathBuf {
    let folder = bench.path("tree/x86");
    std::fs::create_dir_all(&folder).expect("writable");
    for (name, bytes) in images {
        std::fs::write(folder.join(name), bytes).expect("writable");
    }
    std::fs::write(folder.join("unittests.cfg"), config).expect("writable");
    bench.path("tree")
}

fn run(bench: &Bench, tree: &PathBuf, words: &[&str]) -> Finished {
    let line = bench.line(["kvm-unit-tests"]).words(words).words([tree]);
    // With KVM below, plain QEMU's guests would see what ours do.
    line.env("VIADUCT_ACCEL", "tcg").finish()
}

fn multiboot(code: impl FnOnce(&mut CodeAssembler) -> Assembled) -> Vec<u8> {
    image(Mark::Multiboot, code)
}

fn exits(code: &mut CodeAssembler, value: u32) -> Assembled {
    code.mov(eax, value)?;
    exit(code)
}

fn fails(code: &mut CodeAssembler, why: &str) -> Assembled {
    say(code, why)?;
    exits(code, 1)
}

/// Passes on plain QEMU only: by the hypervisor's name.
fn fails_here(code: &mut CodeAssembler) -> Assembled {
    const KVMK: u32 = u32::from_le_bytes(*b"KVMK");
    let mut other = code.create_label();
    code.mov(eax, 0x4000_0000)?;
    code.cpuid()?;
    code.cmp(ebx, KVMK)?;
    code.jne(other)?;
    fails(code, "FAIL: here only\n")?;
    code.set_label(&mut other)?;
    exits(code, 0)
}

/// Prints its command line.
fn echoes(code: &mut CodeAssembler) -> Assembled {
    code.mov(esi, dword_ptr(ebx + 16))?;
    print(code)?;
    exits(code, 0)
}

fn hangs(code: &mut CodeAssembler) -> Assembled {
    let mut again = code.create_label();
    code.set_label(&mut again)?;
    code.in_(al, 0x80_u32)?;
    code.jmp(again)
}

/// Tests of every kind. "emulator" and "s3" are on the list of expected
/// failures.
const CONFIG: &str = "\
[words]
file = echo.flat
test_args = 'two words'
groups = quick texts

[same]
file = same.flat

[ours]
file = ours.flat
groups = quick

[nothing]
file = skip.flat

[hanging]
file = hang.flat
timeout = 3

[s3]
file = ours.flat

[emulator]
file = echo.flat

[by-hand]
file = echo.flat
groups = nodefault

[narrow]
file = echo.flat
arch = i386

[absent]
file = absent.flat
";

#[test]
fn each_test_is_judged_by_what_it_does_here_and_without_us() {
    let bench = Bench::new();
    let images = [
        ("echo.flat", multiboot(echoes)),
        (
            "same.flat",
            multiboot(|code| fails(code, "FAIL: everywhere\n")),
        ),
        ("ours.flat", multiboot(fails_here)),
        ("skip.flat", multiboot(|code| exits(code, SKIPPED))),
        ("hang.flat", multiboot(hangs)),
    ];
    let tree = tree(&bench, &images, CONFIG);
    let (tap, junit) = (bench.path("tap"), bench.path("junit"));
    let files = ["--tap", tap.to_str().expect("plain letters"), "--junit"];
    let files = [&files[..], &[junit.to_str().expect("plain letters")]].concat();
    let done = run(&bench, &tree, &files);
    assert_eq!(done.status, 1, "{}", done.err());

    let table = done.out();
    let expected = [
        ("words", "pass", "ok 1 - words"),
        (
            "same",
            "platform",
            "not ok 2 - same # TODO FAIL: everywhere",
        ),
        ("ours", "FAIL", "not ok 3 - ours # FAIL: here only"),
        ("nothing", "skip", "ok 4 - nothing # SKIP "),
        ("hanging", "platform", "not ok 5 - hanging # TODO "),
        ("s3", "expected", "not ok 6 - s3 # TODO "),
        ("emulator", "SURPRISE", "not ok 7 - emulator # "),
        ("by-hand", "skip", "ok 8 - by-hand # SKIP marked"),
        ("narrow", "skip", "ok 9 - narrow # SKIP i386 only"),
        (
            "absent",
            "skip",
            "ok 10 - absent # SKIP absent.flat is not built",
        ),
    ];
    let text = std::fs::read_to_string(&tap).expect("written");
    let mut lines = text.lines().skip(2);
    for (name, word, line) in expected {
        let row = table.lines().map(|row| row.split_whitespace().take(2));
        let mut row = row.filter(|row| row.clone().eq([name, word]));
        assert!(row.next().is_some(), "{name} is not {word} in\n{table}");
        let seen = lines.next().expect("a line for each");
        assert!(seen.starts_with(line), "no {line:?} in\n{text}");
    }
    let sum = "10 tests: 1 passed, 4 skipped, 2 fail on the platform alone, \
               1 expected failures, 2 failed";
    assert!(table.contains(sum), "{table}");

    let report = std::fs::read_to_string(&junit).expect("written");
    for part in [r#"tests="10""#, r#"failures="2""#, "echo.flat two words"] {
        assert!(report.contains(part), "no {part} in {report}");
    }
    bench.assert_nothing_left();
}

#[test]
fn a_filter_takes_names_and_groups() {
    let bench = Bench::new();
    let tree = tree(&bench, &[("echo.flat", multiboot(echoes))], CONFIG);
    for (word, names) in [("ord", &["words"][..]), ("texts", &["words"])] {
        let done = run(&bench, &tree, &["--filter", word]);
        assert_eq!(done.status, 0, "{}", done.out());
        let rows = done.out();
        let mut rows = rows.lines().skip(1);
        for name in names {
            let row = rows.next().expect("a row for each");
            assert_eq!(row.split_whitespace().next(), Some(*name), "{row}");
        }
        let sum = format!("{} tests: {0} passed", names.len());
        assert!(rows.any(|row| row.starts_with(&sum)), "{}", done.out());
    }
    bench.assert_nothing_left();
}

#[test]
fn a_hanging_test_is_ended_with_its_place() {
    let bench = Bench::new();
    let config = "[hanging]\nfile = hang.flat\ntimeout = 900\n";
    let tree = tree(&bench, &[("hang.flat", multiboot(hangs))], config);
    // Our limit instead of the tree's.
    let done = run(&bench, &tree, &["--no-reference", "--timeout", "2"]);
    assert_eq!(done.status, 1, "{}", done.err());
    for fact in ["within 2 s", "vCPU 0 was at 0x1000c", "exit_io"] {
        assert!(done.out().contains(fact), "no {fact:?} in {}", done.out());
    }
    bench.assert_nothing_left();
}

#[test]
fn four_vcpus_of_a_test_lie_on_two_nodes() {
    let bench = Bench::new();
    let images = [
        ("four.flat", multiboot(start_others(3, 3))),
        ("wrong.flat", multiboot(start_others(3, 2))),
    ];
    let config = "[four]\nfile = four.flat\nsmp = 4\n\n[wrong]\nfile = wrong.flat\nsmp = 4\n";
    let tree = tree(&bench, &images, config);
    let tap = bench.path("tap");
    let words = ["--nodes", "2", "--no-reference", "--tap"];
    let tap_word = tap.to_str().expect("plain letters");
    let done = run(&bench, &tree, &[&words[..], &[tap_word]].concat());
    assert_eq!(done.status, 1, "{}", done.err());
    let text = std::fs::read_to_string(&tap).expect("written");
    let lines: Vec<_> = text.lines().skip(2).collect();
    assert_eq!(lines[0], "ok 1 - four", "{text}");
    assert!(lines[1].starts_with("not ok 2 - wrong"), "{text}");
    bench.assert_nothing_left();
}

#[test]
fn what_cannot_be_run_is_said_in_a_line() {
    let bench = Bench::new();
    let empty = tree(&bench, &[], CONFIG);
    for (words, folder, reason) in [
        (&[][..], "/nonexistent".into(), "no such file"),
        (
            &["--filter", "nonsense"],
            empty.clone(),
            "no test is called",
        ),
        (&["--nodes", "9"], empty, "--nodes"),
    ] {
        let done = run(&bench, &folder, words);
        let said = done.err();
        assert_eq!((done.status, said.lines().count()), (125, 1), "{said}");
        assert!(said.contains(reason), "no {reason:?} in {said}");
    }
}
