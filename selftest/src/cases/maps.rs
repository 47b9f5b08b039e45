//! The permission maps of ports and MSRs.
#![expect(unsafe_code, reason = "assembled code of guests")]

use alloc::format;

use hypervisor::arch::svm::vmcb::Misc1;
use vmm_shared::shm::SharedMem;

use crate::code::code;
use crate::lab::{CODE, DATA, Lab, Stop, exit};
use crate::suite::{Suite, Verdict, same};

/// A port that nobody minds: that of POST codes.
const PORT: u64 = 0x80;
const RDX: usize = 2;

fn set_bit(map: &SharedMem, bit: usize) {
    let at = bit / 64 * 8;
    let word: u64 = map.read(at).expect("within the map");
    map.write(at, &(word | 1 << (bit % 64)))
        .expect("within the map");
}

fn port(lab: &mut Lab, code: &[u8], port: u64) {
    lab.intercept(Misc1::IOIO);
    lab.registers.gpr[RDX] = port;
    lab.registers.gpr[6] = DATA;
    lab.registers.gpr[7] = DATA;
    lab.code(code);
}

const IN: u64 = 1;
const STRING: u64 = 1 << 2;
const REPEAT: u64 = 1 << 3;
const BYTE: u64 = 1 << 4;
const WORD: u64 = 1 << 5;
const DOUBLEWORD: u64 = 1 << 6;
const ADDRESS_64: u64 = 1 << 9;
/// The segment's number is there with decode assists only.
const SEGMENT: u64 = 7 << 10;

fn ports(suite: &mut Suite) {
    for (name, code, info) in [
        ("in-byte", code!("in al, dx"), IN | BYTE),
        ("in-word", code!("in ax, dx"), IN | WORD),
        ("in-doubleword", code!("in eax, dx"), IN | DOUBLEWORD),
        ("out-byte", code!("out dx, al"), BYTE),
        ("out-word", code!("out dx, ax"), WORD),
        ("out-doubleword", code!("out dx, eax"), DOUBLEWORD),
        ("out-immediate", code!("out 0x80, al"), BYTE),
        ("insb", code!("insb"), IN | STRING | BYTE | ADDRESS_64),
        ("outsd", code!("outsd"), STRING | DOUBLEWORD | ADDRESS_64),
        (
            "rep-outsb",
            code!("rep outsb"),
            STRING | REPEAT | BYTE | ADDRESS_64,
        ),
    ] {
        suite.case(format!("port/{name}"), "15.10.2", move |lab| {
            port(lab, code, PORT);
            lab.registers.gpr[1] = 1;
            set_bit(&lab.ports, 0x80);
            lab.expect_exit_at_start(exit::IOIO)?;
            let control = &lab.vmcb.control;
            // Whether plain IN and OUT tell an address size is open.
            let ignored = SEGMENT | if info & STRING == 0 { 7 << 7 } else { 0 };
            same(
                "exit information 1",
                PORT << 16 | info,
                control.exit_info_1 & !ignored,
            )?;
            same(
                "exit information 2",
                CODE + code.len() as u64,
                control.exit_info_2,
            )
        });
    }
    suite.case("port/map-lets-through", "15.10.1", |lab| {
        port(lab, code!("in al, dx"), PORT);
        set_bit(&lab.ports, 0x7f);
        set_bit(&lab.ports, 0x81);
        lab.expect(Stop::End)
    });
    suite.case("port/any-byte-counts", "15.10.1", |lab| {
        port(lab, code!("in eax, dx"), PORT - 3);
        set_bit(&lab.ports, 0x80);
        lab.expect_exit_at_start(exit::IOIO)
    });
    suite.case("port/behind-the-last", "15.10.1", |lab| {
        port(lab, code!("in eax, dx"), 0xffff);
        set_bit(&lab.ports, 0x1_0001);
        lab.expect_exit_at_start(exit::IOIO)
    });
    suite.case("port/map-off", "15.10", |lab| {
        lab.registers.gpr[RDX] = PORT;
        lab.code(code!("in al, dx"));
        set_bit(&lab.ports, 0x80);
        lab.expect(Stop::End)
    });
    suite.case("port/privilege-comes-first", "15.10.2", |lab| {
        port(lab, code!("in al, dx"), PORT);
        lab.in_user_mode();
        set_bit(&lab.ports, 0x80);
        lab.expect(Stop::Vector(13))
    });
}

/// A register of each range that the map has, and its first bit there.
const MSRS: [(&str, u64, usize); 3] = [
    ("low", 0x174, 0x174 * 2),
    ("c0000000", 0xc000_0082, 0x800 * 8 + 0x82 * 2),
    ("c0010000", 0xc001_0117, 0x1000 * 8 + 0x117 * 2),
];

fn msr(lab: &mut Lab, code: &[u8], register: u64) {
    lab.intercept(Misc1::MSR);
    lab.registers.gpr[1] = register;
    lab.code(code);
}

fn registers(suite: &mut Suite) {
    for (name, register, bit) in MSRS {
        suite.case(format!("msr/read-{name}"), "15.11", move |lab| {
            msr(lab, code!("rdmsr"), register);
            set_bit(&lab.msrs, bit);
            lab.expect_exit_at_start(exit::MSR)?;
            same("exit information 1", 0, lab.vmcb.control.exit_info_1)
        });
        suite.case(format!("msr/write-{name}"), "15.11", move |lab| {
            msr(lab, code!("wrmsr"), register);
            set_bit(&lab.msrs, bit + 1);
            lab.expect_exit_at_start(exit::MSR)?;
            same("exit information 1", 1, lab.vmcb.control.exit_info_1)
        });
    }
    suite.case("msr/reads-and-writes-apart", "15.11", |lab| {
        let (_, register, bit) = MSRS[1];
        msr(lab, code!("rdmsr", "wrmsr"), register);
        set_bit(&lab.msrs, bit + 1);
        lab.expect(Stop::Exit(exit::MSR))?;
        same("exit at", CODE + 2, lab.registers.rip)
    });
    suite.case("msr/outside-of-the-map", "15.11", |lab| {
        msr(lab, code!("rdmsr"), 0x4b56_4d00);
        lab.expect_exit_at_start(exit::MSR)
    });
    suite.case("msr/unknown-is-gp", "15.11", unknown_msr);
}

/// Past the map, so a processor that lacks the register raises #GP.
fn unknown_msr(lab: &mut Lab) -> Verdict {
    lab.registers.gpr[1] = 0x4b56_4d00;
    lab.code(code!("rdmsr"));
    lab.expect(Stop::Vector(13))
}

pub(crate) fn add(suite: &mut Suite) {
    ports(suite);
    registers(suite);
}
