//! What programs learn of time and place without a call: a page of time data,
//! and behind it the shared object that reads it, `vdso/vdso.rs`.
//!
//! Both are pages of one file without a name that is mapped into each program
//! privately: who makes it writable writes a copy of its own.

use core::mem::offset_of;
use core::sync::atomic::Ordering;

use vmm_shared::addr::PAGE_SIZE;

use crate::errno::{Errno, Result};
use crate::fs::node::{Maker, NodeId, Objects, Use};
use crate::fs::{MEMORY_DEVICE, setup};
use crate::mem::frames::{Frame, Frames};
use crate::mem::page_up;
use crate::mem::regions::{Backing, Prot, Purpose, Region, Sharing};
use crate::mem::space::Space;
pub(crate) use clock::nanoseconds;
use clock::{CLOCK_PAGE, Clock};

#[path = "../vdso/clock.rs"]
mod clock;

static IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/vdso.so"));

/// Where programs find the time data: above all that is placed without an
/// address, below the stack.
const AT: u64 = 0x7fff_f800_0000;
/// Where they find the shared object.
pub(crate) const IMAGE_AT: u64 = AT + PAGE_SIZE;
const _: () = assert!(CLOCK_PAGE as u64 == PAGE_SIZE);

/// Time data and shared object.
#[derive(Debug)]
pub(crate) struct Vdso {
    file: NodeId,
    clock: Frame,
}

impl Vdso {
    /// For a TSC of this scale that was 0 at this time.
    pub(crate) fn new(objects: &mut Objects, ns_per_tick: u64, boot_wall_ns: u64) -> Result<Self> {
        let maker = Maker {
            uid: 0,
            gid: 0,
            now: boot_wall_ns,
        };
        let file = objects.make(setup::file(), 0o555, MEMORY_DEVICE, maker);
        objects.hold(file);
        if objects.write(file, PAGE_SIZE, IMAGE)? < IMAGE.len() {
            return Err(Errno::ENOSPC);
        }
        let clock = objects.own_page(file, 0, Use::Write)?;
        let vdso = Self { file, clock };
        let scale = offset_of!(Clock, ns_per_tick);
        let scale = objects.frames.word(clock, scale);
        // Relaxed: nobody reads it yet.
        scale.store(ns_per_tick, Ordering::Relaxed);
        vdso.set_clock(&objects.frames, boot_wall_ns);
        Ok(vdso)
    }

    /// Sets the wall clock: what it said when the TSC was 0.
    pub(crate) fn set_clock(&self, frames: &Frames, boot_wall_ns: u64) {
        let word = frames.word(self.clock, offset_of!(Clock, boot_wall_ns));
        // Relaxed: it is all there is to see, and who is told of it by
        // another program is told after this.
        word.store(boot_wall_ns, Ordering::Relaxed);
    }

    /// Maps both into a new program.
    pub(crate) fn map(&self, space: &mut Space, objects: &mut Objects) -> Result<()> {
        let len = page_up(IMAGE.len() as u64).ok_or(Errno::ENOMEM)?;
        for (at, len, prot) in [
            (AT, PAGE_SIZE, Prot::READ),
            (IMAGE_AT, len, Prot::READ | Prot::EXECUTE),
        ] {
            let region = Region {
                end: 0,
                prot,
                sharing: Sharing::Private,
                backing: Backing::File(self.file, at - AT),
                purpose: Purpose::Mapping,
            };
            objects.hold(self.file);
            if let Err(errno) = space.map(objects, Some(at), true, len, region) {
                objects.release(self.file);
                return Err(errno);
            }
        }
        Ok(())
    }

    /// What a mapping of a file at an offset is called, if it is one of these.
    pub(crate) fn name(&self, file: NodeId, offset: u64) -> Option<&'static str> {
        match offset {
            _ if file != self.file => None,
            0 => Some("[vvar]"),
            _ => Some("[vdso]"),
        }
    }
}

#[cfg(test)]
mod tests {
    use elf::ElfBytes;
    use elf::abi::{PT_LOAD, SHT_RELA};
    use elf::endian::LittleEndian;

    use super::*;

    fn image() -> ElfBytes<'static, LittleEndian> {
        ElfBytes::minimal_parse(IMAGE).expect("an ELF file")
    }

    #[test]
    fn the_shared_object_is_one_segment_that_needs_no_relocation() {
        let segments = image().segments().expect("some");
        let loads: Vec<_> = segments
            .iter()
            .filter(|one| one.p_type == PT_LOAD)
            .collect();
        assert_eq!(loads.len(), 1);
        assert_eq!((loads[0].p_offset, loads[0].p_vaddr), (0, 0));
        assert_eq!(loads[0].p_filesz, loads[0].p_memsz, "no data");
        let sections = image().section_headers().expect("some");
        assert!(sections.iter().all(|one| one.sh_type != SHT_RELA));
    }

    #[test]
    fn its_functions_have_the_names_and_the_version_that_libraries_ask_for() {
        let (symbols, names) = image().dynamic_symbol_table().expect("sound").expect("one");
        let versions = image().symbol_version_table().expect("sound").expect("one");
        let mut found: Vec<_> = (1..symbols.len())
            .map(|index| {
                let symbol = symbols.get(index).expect("in range");
                let version = versions.get_definition(index).expect("sound").expect("one");
                let version: Vec<_> = version.names.map(|name| name.expect("sound")).collect();
                assert_eq!(version, ["LINUX_2.6"]);
                names.get(symbol.st_name as usize).expect("a name")
            })
            .collect();
        found.sort_unstable();
        let calls = [
            "clock_getres",
            "clock_gettime",
            "getcpu",
            "gettimeofday",
            "time",
        ];
        assert_eq!(found, calls.map(|call| format!("__vdso_{call}")));
    }

    #[test]
    fn time_is_the_scaled_tsc_and_ends_at_the_end() {
        let scale = crate::machine::ns_per_tick(2_000_000);
        assert_eq!(nanoseconds(0, scale), 0);
        assert_eq!(nanoseconds(2_000_000_000, scale), 1_000_000_000);
        assert_eq!(nanoseconds(u64::MAX, u64::MAX), u64::MAX);
    }
}
