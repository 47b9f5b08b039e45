//! What can be wrong before anything runs: each is one line that names the
//! thing and what to do, with Viaduct's own exit status, and nothing stays.

use viaduct_tests::{Bench, Finished, Line};

/// Fails unless Viaduct refused, naming all of `facts`, and left nothing.
#[track_caller]
fn refused(line: Line<'_>, facts: &[&str]) {
    let done = line.finish();
    assert_refused(&done, facts);
}

#[track_caller]
fn assert_refused(done: &Finished, facts: &[&str]) {
    let said = done.err();
    assert_eq!((done.status, done.out().as_str()), (125, ""), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.starts_with("viaduct: "), "{said}");
    for fact in facts {
        assert!(said.contains(fact), "no {fact:?} in {said}");
    }
}

/// `run` and `up` refuse the same.
#[track_caller]
fn both_refuse(bench: &Bench, words: &[&str], facts: &[&str]) {
    for verb in ["run", "up"] {
        let line = bench
            .line([verb])
            .words(["--rootfs", "busybox"])
            .words(words);
        let line = match verb {
            "run" => line.guest(["true"]),
            _ => line,
        };
        refused(line, facts);
        bench.assert_nothing_left();
    }
}

#[test]
fn a_processor_without_svm() {
    let bench = Bench::new();
    let line = bench.line(["run", "--rootfs", "busybox"]).guest(["true"]);
    let line = line
        .env("VIADUCT_CPU", "max,-svm")
        .env("VIADUCT_ACCEL", "tcg");
    refused(line, &["SVM"]);
    bench.assert_nothing_left();
}

#[test]
fn a_processor_without_nested_paging() {
    let bench = Bench::new();
    let line = bench.line(["run", "--rootfs", "busybox"]).guest(["true"]);
    let line = line
        .env("VIADUCT_CPU", "max,-npt")
        .env("VIADUCT_ACCEL", "tcg");
    refused(line, &["nested paging"]);
    bench.assert_nothing_left();
}

#[test]
fn a_processor_model_that_qemu_does_not_know() {
    let bench = Bench::new();
    let line = bench.line(["run", "--rootfs", "busybox"]).guest(["true"]);
    refused(line.env("VIADUCT_CPU", "no-such-model"), &["no-such-model"]);
    bench.assert_nothing_left();
}

#[test]
fn an_unknown_accelerator() {
    let bench = Bench::new();
    let line = bench.line(["run", "--rootfs", "busybox"]).guest(["true"]);
    refused(
        line.env("VIADUCT_ACCEL", "warp"),
        &["VIADUCT_ACCEL", "warp", "tcg"],
    );
}

#[test]
fn qemu_missing_old_or_something_else() {
    let bench = Bench::new();
    let version = |name: &str, version: &str| {
        let path = bench.script(name, &format!("echo 'QEMU emulator version {version}'"));
        path.display().to_string()
    };
    let old = version("qemu-old", "7.1.0 (Debian)");
    let ancient = version("qemu-ancient", "2.11.1");
    let strange = bench.script("strange", "echo hello").display().to_string();
    let silent = bench.script("silent", "exit 1").display().to_string();
    for (path, facts) in [
        ("/no/such/qemu", ["not found", "/no/such/qemu", "install"]),
        (&old, ["7.1.0", "7.2", "upgrade"]),
        (&ancient, ["2.11.1", "7.2", "upgrade"]),
        (
            &strange,
            ["does not look like QEMU", "hello", "VIADUCT_QEMU"],
        ),
        (
            &silent,
            ["does not look like QEMU", "silent", "VIADUCT_QEMU"],
        ),
    ] {
        let line = bench.line(["run", "--rootfs", "busybox"]).guest(["true"]);
        refused(line.env("VIADUCT_QEMU", path), &facts);
        bench.assert_nothing_left();
    }
}

#[test]
fn qemu_that_ends_at_once() {
    let bench = Bench::new();
    let script = "case $1 in --version) echo 'QEMU emulator version 7.2.0';; \
                  *) echo 'out of luck' >&2; exit 1;; esac";
    let path = bench.script("unlucky", script);
    let line = bench.line(["run", "--rootfs", "busybox"]).guest(["true"]);
    refused(line.env("VIADUCT_QEMU", path), &["node 0", "out of luck"]);
    bench.assert_nothing_left();
}

#[test]
fn the_hypervisor_or_the_agent_missing() {
    let bench = Bench::new();
    for variable in ["VIADUCT_HYPERVISOR", "VIADUCT_AGENT"] {
        let line = bench.line(["run", "--rootfs", "busybox"]).guest(["true"]);
        let line = line.env(variable, "/no/such/file");
        refused(line, &["/no/such/file", variable]);
        bench.assert_nothing_left();
    }
}

#[test]
fn a_hypervisor_that_is_none() {
    let bench = Bench::new();
    let path = bench.file("hypervisor", b"not an ELF file");
    let line = bench.line(["run", "--rootfs", "busybox"]).guest(["true"]);
    refused(line.env("VIADUCT_HYPERVISOR", path), &["node 0"]);
    bench.assert_nothing_left();
}

/// A kernel file with a sound header and nothing behind it.
fn header() -> Vec<u8> {
    let mut header = vec![0; 8192];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[4]);
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &[0x0f, 0x02]);
    put(0x211, &[1]);
    put(0x230, &[0, 0, 0x20, 0]);
    put(0x234, &[1]);
    put(0x236, &[1]);
    put(0x238, &[0xff, 0x07]);
    header
}

#[test]
fn kernels_that_are_none() {
    let bench = Bench::new();
    let initramfs = bench.file("initramfs", b"x");
    let initramfs = initramfs.to_str().expect("plain letters");
    let old = {
        let mut old = header();
        old[0x206..0x208].copy_from_slice(&[0x0b, 0x02]);
        old
    };
    let only_32_bit = {
        let mut kernel = header();
        kernel[0x236] = 0;
        kernel
    };
    let wrong_magic = {
        let mut kernel = header();
        kernel[0x202] = b'h';
        kernel
    };
    for (name, bytes, reason, early) in [
        ("empty", Vec::new(), "neither", "neither"),
        ("text", b"not a kernel".repeat(1000), "neither", "neither"),
        (
            "elf",
            [b"\x7fELF".as_slice(), &[0; 8192]].concat(),
            "ELF header",
            "ELF header",
        ),
        ("magic", wrong_magic, "neither", "neither"),
        ("old", old, "2.11 is too old", "2.11 is older than 2.12"),
        ("narrow", only_32_bit, "64-bit", "64-bit"),
        ("cut", header()[..2048].to_vec(), "truncated", "cut off"),
    ] {
        let path = bench.file(name, &bytes);
        let path = path.to_str().expect("plain letters");
        // With an initramfs no build looks at the kernel first.
        both_refuse(&bench, &["--guest", path], &[name, early]);
        let words = ["--guest", path, "--initramfs", initramfs];
        both_refuse(&bench, &words, &["kernel", name, reason, "bzImage"]);
    }
    both_refuse(
        &bench,
        &["--guest", "/no/such/kernel"],
        &["kernel", "/no/such/kernel"],
    );
    both_refuse(&bench, &["--guest", "/tmp"], &["kernel", "/tmp"]);
}

#[test]
fn a_kernel_whose_end_is_missing() {
    let bench = Bench::new();
    // The header promises more than there is; only the loader sees it.
    let mut kernel = header();
    kernel[0x1f4..0x1f8].copy_from_slice(&0x10_0000_u32.to_le_bytes());
    let path = bench.file("short", &kernel);
    let initramfs = bench.file("initramfs", b"x");
    let line = bench
        .line(["run", "--rootfs", "busybox", "--guest"])
        .words([&path])
        .words(["--initramfs"])
        .words([&initramfs])
        .guest(["true"]);
    refused(line, &["runcated"]);
    bench.assert_nothing_left();
}

#[test]
fn memory_that_no_vm_can_have() {
    let bench = Bench::new();
    for (memory, facts) in [
        ("64M", ["64M", "--memory 128M"]),
        ("0", ["0", "--memory 128M"]),
        ("257M", ["257M", "--memory 256M or 258M"]),
        ("1073745920", ["1048580K", "multiple of 2M"]),
        ("lots", ["lots", "not a size"]),
        ("-1G", ["-1G", "--help"]),
        ("99999999999T", ["99999999999T", "not a size"]),
    ] {
        both_refuse(&bench, &[&format!("--memory={memory}")], &facts);
    }
    let words = ["--memory", "2G", "--node-memory", "1G"];
    both_refuse(&bench, &words, &["2G", "1G", "--node-memory"]);
    // Large, but it can be had.
    let words = ["run", "--rootfs", "busybox", "--node-memory", "100G"];
    bench.line(words).guest(["true"]).finish().well();
    // Sparse files have room for more than an emulated processor can address.
    let words = ["--nodes", "2", "--node-memory", "1T"];
    both_refuse(&bench, &words, &["node ", "address bits", "smaller nodes"]);
}

#[test]
fn more_vcpus_than_cores_can_share() {
    let bench = Bench::new();
    both_refuse(
        &bench,
        &["--vcpus", "17"],
        &["17 vCPUs", "2 core", "--vcpus 16"],
    );
    both_refuse(&bench, &["--vcpus", "0"], &["vCPU", "--vcpus 1"]);
    both_refuse(&bench, &["--cores", "0"], &["--cores"]);
    both_refuse(&bench, &["--cores", "100000"], &["100000 cores", "64"]);
    both_refuse(
        &bench,
        &["--cores", "4", "--vcpus", "33"],
        &["33 vCPUs", "4 core"],
    );
    both_refuse(
        &bench,
        &["--vcpus", "2", "--max-vcpus", "1"],
        &["--max-vcpus from 2 to 16"],
    );
}

#[test]
fn racks_and_guests_that_cannot_be() {
    let bench = Bench::new();
    both_refuse(&bench, &["--nodes", "9"], &["9 nodes", "--nodes 8"]);
    both_refuse(&bench, &["--nodes", "0"], &["--nodes"]);
    both_refuse(
        &bench,
        &["--guest", "pv"],
        &["pv", "busybox", "--rootfs debian"],
    );
}

#[test]
fn options_that_do_not_exist() {
    let bench = Bench::new();
    both_refuse(
        &bench,
        &["--no-such-option"],
        &["--no-such-option", "--help"],
    );
    both_refuse(&bench, &["--vcpus"], &["--vcpus", "--help"]);
    both_refuse(&bench, &["--name", "../up"], &["../up", "letters"]);
    refused(bench.line(["fly"]), &["fly", "--help"]);
    refused(bench.line::<&str>([]), &["--help"]);
    refused(bench.line(["run", "stray"]), &["stray", "--help"]);
}

#[test]
fn a_rack_file_that_cannot_be_used() {
    let bench = Bench::new();
    for (name, text) in [
        ("broken", "[[node]\ncores = 2"),
        ("unknown", "[[node]]\ncores = 2\ncolour = \"red\""),
        ("none", ""),
    ] {
        let path = bench.file(name, text.as_bytes());
        let path = path.to_str().expect("plain letters");
        both_refuse(&bench, &["--rack", path], &[name]);
    }
    both_refuse(&bench, &["--rack", "/no/such/rack"], &["/no/such/rack"]);
}

#[test]
fn roots_that_are_none() {
    let bench = Bench::new();
    let text = bench.file("text", b"not a file system");
    let zeros = bench.file("zeros", &vec![0; 4 << 20]);
    for (path, facts) in [
        ("/no/such/root", ["root image", "/no/such/root", "--rootfs"]),
        ("/tmp", ["root image", "/tmp", "--rootfs"]),
        (
            text.to_str().expect("plain"),
            ["root image", "text", "--rootfs"],
        ),
        (
            zeros.to_str().expect("plain"),
            ["root image", "zeros", "--rootfs"],
        ),
    ] {
        let line = bench.line(["run", "--rootfs", path]).guest(["true"]);
        refused(line, &facts);
        bench.assert_nothing_left();
    }
    both_refuse(
        &bench,
        &["--initramfs", "/no/such/cpio"],
        &["initramfs", "/no/such/cpio"],
    );
}

#[test]
fn an_initramfs_that_brings_nothing_up() {
    let bench = Bench::new();
    let path = bench.file("garbage", &viaduct_tests::noise(1 << 20));
    let line = bench
        .line([
            "run",
            "--rootfs",
            "busybox",
            "--append",
            "reboot=a",
            "--initramfs",
        ])
        .words([&path])
        .guest(["true"]);
    refused(line, &["node 0", "Kernel panic"]);
    bench.assert_nothing_left();
}

#[test]
fn a_command_line_that_is_too_long() {
    let bench = Bench::new();
    let words = "x".repeat(3000);
    both_refuse(&bench, &["--append", &words], &["--append", "2047"]);
}

#[test]
fn a_name_that_is_taken_and_one_that_is_not_there() {
    let bench = Bench::new();
    let small = ["--rootfs", "busybox", "--memory", "256M"];
    bench.up("taken", &small);
    let facts = ["taken", "already up"];
    refused(bench.line(["up", "--name", "taken"]).words(small), &facts);
    let run = bench.line(["run", "--name", "taken"]).words(small);
    refused(run.guest(["true"]), &facts);
    // It goes on.
    bench.exec("taken", &["true"]).finish().well();
    bench.down("taken");
    for verb in ["status", "nodes", "vcpus", "memory", "down", "console"] {
        refused(bench.line([verb, "--name", "taken"]), &["taken"]);
    }
    refused(bench.exec("taken", &["true"]), &["taken"]);
    bench.assert_nothing_left();
}

#[test]
fn a_cache_that_cannot_be_written() {
    let bench = Bench::new();
    let file = bench.file("cache", b"no folder");
    let line = bench.line(["run", "--rootfs", "busybox"]).guest(["true"]);
    refused(line.env("VIADUCT_CACHE", &file), &["cache"]);
    bench.assert_nothing_left();
}

#[test]
fn a_guest_that_takes_too_long() {
    let bench = Bench::new();
    let words = ["run", "--rootfs", "busybox", "--boot-timeout", "1"];
    refused(
        bench.line(words).guest(["true"]),
        &["1 s", "--boot-timeout"],
    );
    bench.assert_nothing_left();
}

#[test]
fn no_terminal_for_a_terminal() {
    let bench = Bench::new();
    let line = bench.line(["run", "--rootfs", "busybox", "--tty"]);
    refused(line.guest(["true"]), &["--tty", "terminal"]);
    bench.assert_nothing_left();
}
