//! The registers of what comes and goes, under a guest that does what it likes
//! with them while units are given and asked back.
#![no_main]

use hypervisor::devices::hotplug::{Hotplug, HotplugEffect, LEN};
use hypervisor::devices::{IrqLevel, Width};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

/// More than there are, so that some don't exist.
const NUMBERS: u16 = 6;

#[derive(Arbitrary, Debug)]
enum Step {
    Insert(u16),
    AskBack(u16),
    TakeBack(u16),
    Leave(u16),
    Read(u16, u8),
    Write(u16, u8, u32),
}

#[derive(Arbitrary, Debug)]
struct Input {
    units: u8,
    least: u8,
    present: u8,
    steps: Vec<Step>,
}

fn width(raw: u8) -> Width {
    [Width::Byte, Width::Word, Width::Dword, Width::Qword][usize::from(raw % 4)]
}

fuzz_target!(|input: Input| {
    let units = u16::from(input.units % 5);
    let least = usize::from(input.least % 2);
    let mut block = Hotplug::new(units, least, |unit| input.present >> unit & 1 != 0);
    let count = |block: &Hotplug| (0..NUMBERS).filter(|unit| block.is_present(*unit)).count();
    let mut most = count(&block);
    // Those whose event a read of the first register has shown.
    let mut shown = [false; NUMBERS as usize];
    for step in input.steps {
        let before = count(&block);
        match step {
            Step::Insert(unit) => {
                shown[usize::from(unit % NUMBERS)] = false;
                block.insert(unit % NUMBERS);
                assert_eq!(block.is_present(unit % NUMBERS), unit % NUMBERS < units);
            }
            Step::AskBack(unit) => {
                shown[usize::from(unit % NUMBERS)] = false;
                block.ask_back(unit % NUMBERS);
                assert_eq!(count(&block), before, "it is asked for, not taken");
            }
            Step::TakeBack(unit) => {
                let was_unseen = block.take_back(unit % NUMBERS);
                assert_eq!(count(&block), before - usize::from(was_unseen));
                assert!(!was_unseen || before > least, "the last ones stay");
                assert!(!was_unseen || !shown[usize::from(unit % NUMBERS)]);
                assert!(!block.take_back(unit % NUMBERS), "once");
            }
            Step::Leave(unit) => {
                let was_unseen = block.leave(unit % NUMBERS);
                assert!(!was_unseen || block.is_present(unit % NUMBERS));
                assert!(!was_unseen || !shown[usize::from(unit % NUMBERS)]);
                assert!(!block.leave(unit % NUMBERS), "once");
                assert_eq!(count(&block), before);
            }
            Step::Read(offset, bytes) => {
                let value = block.read(offset % (LEN + 2), width(bytes));
                assert_eq!(count(&block), before);
                if offset % (LEN + 2) == 0 && matches!(width(bytes), Width::Dword) {
                    let has_event = block.irq_level() == IrqLevel::Asserted;
                    assert_eq!(
                        value != u32::MAX,
                        has_event,
                        "the line says what the register does"
                    );
                    assert!(value == u32::MAX || value < u32::from(units));
                    if has_event {
                        shown[usize::try_from(value).expect("small")] = true;
                    }
                }
            }
            Step::Write(offset, bytes, value) => {
                let effect = block.write(offset % (LEN + 2), width(bytes), value);
                assert!(effect.unit().is_none_or(|unit| unit < units));
                let gone = matches!(
                    effect,
                    HotplugEffect::Ejected(_) | HotplugEffect::Declined(..)
                );
                assert_eq!(count(&block), before - usize::from(gone), "{effect:?}");
                if let HotplugEffect::Ejected(unit) | HotplugEffect::Declined(unit, _) = effect {
                    assert!(!block.is_present(unit));
                }
                assert!(!gone || before > least, "the last ones stay");
                if let HotplugEffect::Kept(unit, _) = effect {
                    assert!(unit < units);
                }
            }
        }
        most = most.max(count(&block));
        assert!(most <= usize::from(units));
    }
});
