//! AML of units that come and go: vCPUs, and blocks of memory.
//!
//! It speaks to the registers of [`hotplug`](crate::devices::hotplug). All
//! names begin with the letter of the kind of unit; in ASL, for vCPUs:
//!
//! ```text
//!   Method (CSCN) {                      // an event has come
//!       Acquire (CLCK, 0xFFFF)
//!       Local0 = CSEL                    // the first vCPU with an event
//!       While (Local0 != 0xFFFFFFFF) {
//!           If (CINS) { CTFY (Local0, 1)  CINS = 1 }
//!           If (CREM) { CTFY (Local0, 3)  CREM = 1 }
//!           Local0 = CSEL
//!       }
//!       Release (CLCK)
//!   }
//! ```
//!
//! Source: ACPI specification 6.5, sections 5.6.6 and 6.3.

use acpi_tables::aml::{
    Acquire, Arg, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If,
    Local, Method, MethodCall, Mutex, NotEqual, Notify, ONE, OpRegion, OpRegionSpace, Path,
    Release, Return, Store, While, ZERO,
};
use acpi_tables::{Aml, AmlSink};
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use crate::devices::hotplug;

/// Present, enabled, shown, functioning.
const STATUS_ALL: u8 = 0xf;
/// What the selection reads when there is no event.
const NO_EVENT: u32 = u32::MAX;
/// What to notify a device of.
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;
/// Waits for a mutex as long as it takes.
const FOR_EVER: u16 = 0xffff;

/// A name of four letters, of which the first says what it is about.
fn name(letter: u8, [a, b, c]: [u8; 3]) -> [u8; 4] {
    [letter, a, b, c]
}

fn path(letter: u8, rest: [u8; 3]) -> Path {
    let name = name(letter, rest);
    Path::new(str::from_utf8(&name).expect("letters"))
}

/// What the guest asks of a unit that can come and go: part of its device.
pub(super) struct Hotpluggable {
    pub letter: u8,
    pub number: u16,
}

impl Aml for Hotpluggable {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let Self { letter, number } = self;
        let call = |rest, arguments| MethodCall::new(path(*letter, rest), arguments);
        let status = call(*b"STA", vec![number]);
        let status = Return::new(&status);
        Method::new("_STA".into(), 0, false, vec![&status]).to_aml_bytes(sink);
        let eject = call(*b"EJT", vec![number]);
        Method::new("_EJ0".into(), 1, false, vec![&eject]).to_aml_bytes(sink);
        let report = call(*b"OST", vec![number, &Arg(0), &Arg(1)]);
        Method::new("_OST".into(), 3, false, vec![&report]).to_aml_bytes(sink);
    }
}

/// The registers of a kind of unit and what is done with them: part of the
/// container of the units.
pub(super) struct Methods {
    pub letter: u8,
    /// Where the registers are.
    pub port: u16,
    /// The names of the units' devices, by their numbers.
    pub devices: Vec<String>,
}

impl Aml for Methods {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let letter = self.letter;
        let path = |rest| path(letter, rest);
        let method = |rest, arguments, body| Method::new(path(rest), arguments, true, body);
        self.registers(sink);
        Mutex::new(path(*b"LCK"), 0).to_aml_bytes(sink);
        let (acquire, release) = (
            Acquire::new(path(*b"LCK"), FOR_EVER),
            Release::new(path(*b"LCK")),
        );
        let [select, present, eject, event, status] =
            [*b"SEL", *b"PRS", *b"EJE", *b"EVT", *b"OSS"].map(path);
        let choose = Store::new(&select, &Arg(0));

        let is_present = Equal::new(&present, &ONE);
        let all = Store::new(&Local(0), &STATUS_ALL);
        let clear = Store::new(&Local(0), &ZERO);
        let when_present = If::new(&is_present, vec![&all]);
        let result = Return::new(&Local(0));
        let body: Vec<&dyn Aml> = vec![&acquire, &choose, &clear, &when_present, &release, &result];
        method(*b"STA", 1, body).to_aml_bytes(sink);

        let eject = Store::new(&eject, &ONE);
        let body: Vec<&dyn Aml> = vec![&acquire, &choose, &eject, &release];
        method(*b"EJT", 1, body).to_aml_bytes(sink);

        let event = Store::new(&event, &Arg(1));
        let status = Store::new(&status, &Arg(2));
        let body: Vec<&dyn Aml> = vec![&acquire, &choose, &event, &status, &release];
        method(*b"OST", 3, body).to_aml_bytes(sink);

        let numbered = (0_u16..).zip(&self.devices);
        let notices: Vec<Notice<'_>> = numbered
            .map(|(number, device)| Notice { number, device })
            .collect();
        let notices = notices.iter().map(|notice| -> &dyn Aml { notice });
        method(*b"TFY", 2, notices.collect()).to_aml_bytes(sink);

        let on = |flag, event| OnEvent {
            letter,
            flag,
            event,
        };
        let inserted = on(*b"INS", DEVICE_CHECK);
        let removing = on(*b"REM", EJECT_REQUEST);
        let next = Store::new(&Local(0), &select);
        let has_event = NotEqual::new(&Local(0), &NO_EVENT);
        let each = While::new(&has_event, vec![&inserted, &removing, &next]);
        let body: Vec<&dyn Aml> = vec![&acquire, &next, &each, &release];
        method(*b"SCN", 0, body).to_aml_bytes(sink);
    }
}

impl Methods {
    fn registers(&self, sink: &mut dyn AmlSink) {
        let region = || path(self.letter, *b"REG");
        let named = |rest, bits| FieldEntry::Named(name(self.letter, rest), bits);
        OpRegion::new(region(), OpRegionSpace::SystemIO, &self.port, &hotplug::LEN)
            .to_aml_bytes(sink);
        let field = |access, entries| {
            // A write of one flag leaves the others alone: they ignore zeros.
            let update = FieldUpdateRule::WriteAsZeroes;
            Field::new(region(), access, FieldLockRule::NoLock, update, entries)
        };
        field(
            FieldAccessType::DWord,
            vec![
                named(*b"SEL", 32),
                FieldEntry::Reserved(32),
                named(*b"EVT", 32),
                named(*b"OSS", 32),
            ],
        )
        .to_aml_bytes(sink);
        field(
            FieldAccessType::Byte,
            vec![
                FieldEntry::Reserved(32),
                named(*b"PRS", 1),
                named(*b"INS", 1),
                named(*b"REM", 1),
                named(*b"EJE", 1),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Notifies a unit's device if it is the one in Arg0.
struct Notice<'a> {
    number: u16,
    device: &'a str,
}

impl Aml for Notice<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let is_it = Equal::new(&Arg(0), &self.number);
        let device = Path::new(self.device);
        let notify = Notify::new(&device, &Arg(1));
        If::new(&is_it, vec![&notify]).to_aml_bytes(sink);
    }
}

/// If this flag is set: notifies the unit in Local0, and clears it.
struct OnEvent {
    letter: u8,
    flag: [u8; 3],
    event: u8,
}

impl Aml for OnEvent {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let flag = path(self.letter, self.flag);
        let is_set = Equal::new(&flag, &ONE);
        let notify = MethodCall::new(path(self.letter, *b"TFY"), vec![&Local(0), &self.event]);
        let clear = Store::new(&flag, &ONE);
        If::new(&is_set, vec![&notify, &clear]).to_aml_bytes(sink);
    }
}
