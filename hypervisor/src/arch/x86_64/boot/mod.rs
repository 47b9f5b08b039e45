//! From the loader to the image's own main function, which [`entry!`](crate::entry)
//! names.
#![expect(unsafe_code, reason = "takes possession of the machine")]

mod pvh;
mod start_info;
mod trampoline;

use alloc::vec::Vec;
use core::convert::Infallible;
use core::ops::Range;
use core::ptr::addr_of;

use talc::{ErrOnOom, Span, Talc, Talck};
use vmm_shared::addr::{Hpa, NodeId, PAGE_SIZE};
use x86_64::registers::control::{Cr4, Cr4Flags};

use self::start_info::StartInfo;
use super::io::{self, NodeExit};
use super::paging::{AddressSpace, Use, zeroed_pages};
use super::time::Clocks;
use super::{apic, cpu, descriptors, mtrr, pci};

/// Bytes of stack for each core, above an unmapped guard page.
const STACK_SIZE: u64 = 64 << 10;
const GUARDED_STACK: u64 = STACK_SIZE + PAGE_SIZE;

#[global_allocator]
static HEAP: Talck<spin::Mutex<()>, ErrOnOom> = Talc::new(ErrOnOom).lock();

unsafe extern "C" {
    static __image_start: u8;
    static __text_start: u8;
    static __text_end: u8;
    static __rodata_end: u8;
    static __data_start: u8;
    static __image_end: u8;
    static boot_stack: u8;
}

/// Why a node did not come up, for its last log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BootError {
    /// The loader's start information is missing or damaged.
    #[error("the loader's start information is missing or damaged")]
    StartInfo,
    /// No memory behind the image for the heap.
    #[error("there is no memory behind the image")]
    NoMemory,
    /// The local APIC's window is not at its usual place.
    #[error("the local APIC's window is at {at:#x}, not at its usual place")]
    ApicWindow {
        /// Where it is.
        at: u64,
    },
    /// No ACPI PM timer to measure the clocks with.
    #[error("there is no ACPI PM timer to measure the clocks with")]
    NoPmTimer,
    /// The firmware has put a region where no page table can point.
    #[error(
        "a region ends at {end:#x}, beyond the {bits} address bits of this processor: \
         the rack needs smaller nodes or fewer"
    )]
    Regions {
        /// Its end.
        end: u64,
        /// Bits of a physical address.
        bits: u8,
    },
    /// Some cores did not start.
    #[error("only {started} of {expected} cores have started")]
    Cores {
        /// Cores that the machine has.
        expected: usize,
        /// Cores that came up.
        started: usize,
    },
}

/// The machine as the boot core hands it to the image's main function.
#[derive(Debug)]
pub struct Machine {
    /// Rates of its clocks.
    pub clocks: Clocks,
    /// APIC ids of its cores, which wait for [`release_other_cores`].
    pub cores: Vec<u8>,
    /// The memory windows of its PCI devices.
    pub windows: Vec<pci::Window>,
    /// Which node of the rack it is.
    pub node: NodeId,
}

unsafe extern "Rust" {
    /// What [`entry!`](crate::entry) defines.
    safe fn viaduct_main(machine: Machine) -> !;
}

/// Names the function that an image runs on its boot core: of a
/// [`Machine`], and never returning.
#[macro_export]
macro_rules! entry {
    ($main:path) => {
        // SAFETY: an image has one main function, and this name is nothing else's.
        #[unsafe(no_mangle)]
        fn viaduct_main(machine: $crate::arch::boot::Machine) -> ! {
            $main(machine)
        }
    };
}

/// A symbol of the linker script as an address.
fn address(symbol: *const u8) -> Hpa {
    Hpa(symbol.addr() as u64)
}

/// The image's parts and what each is for.
fn image() -> [(Range<Hpa>, Use); 3] {
    let part = |start, end, purpose| (address(start)..address(end), purpose);
    [
        part(addr_of!(__text_start), addr_of!(__text_end), Use::Code),
        part(addr_of!(__text_end), addr_of!(__rodata_end), Use::Constants),
        part(addr_of!(__data_start), addr_of!(__image_end), Use::Data),
    ]
}

/// Where Rust begins, on the boot core, mapped one to one up to 4 GiB.
extern "C" fn boot_main(start_info: u32) -> ! {
    io::init_log();
    match boot(start_info) {
        Ok(never) => match never {},
        Err(error) => {
            log::error!("this node cannot start: {error}");
            io::exit(NodeExit::BootFailure)
        }
    }
}

fn boot(start_info: u32) -> Result<Infallible, BootError> {
    let info = StartInfo::read(start_info).ok_or(BootError::StartInfo)?;
    let heap = claim_heap(&info).ok_or(BootError::NoMemory)?;
    descriptors::load();
    enable_features();

    let mut cores = info.cores().ok_or(BootError::StartInfo)?;
    // The pages below the stacks.
    let mut guards: Vec<Hpa> = (1..cores.len()).map(|_| new_stack()).collect();
    let stacks: Vec<Hpa> = guards.iter().map(|it| Hpa(it.0 + GUARDED_STACK)).collect();
    guards.push(address(addr_of!(boot_stack)));
    guards.sort_unstable();
    let mut space = AddressSpace::new();
    for (range, purpose) in image() {
        space.map_around(range, &guards, purpose);
    }
    space.map_around(heap, &guards, Use::Data);
    space.map(
        Hpa(apic::WINDOW)..Hpa(apic::WINDOW + PAGE_SIZE),
        Use::Device,
    );
    space.map(trampoline::page(), Use::Code);
    let windows = pci::find_windows();
    let bits = address_bits();
    for window in &windows {
        let end = window.range.end.0;
        if end > 1 << bits {
            return Err(BootError::Regions { end, bits });
        }
        space.map(window.range.clone(), window.purpose);
    }

    trampoline::install(space.root());
    // SAFETY: image, heap (which holds the tables), devices and this stack
    // are mapped by the lines above.
    unsafe { space.load() };
    io::mask_legacy_interrupts();
    apic::enable().map_err(|at| BootError::ApicWindow { at })?;
    let clocks = Clocks::measure().ok_or(BootError::NoPmTimer)?;
    let started = start_other_cores(&stacks, &clocks);
    if started != cores.len() {
        return Err(BootError::Cores {
            expected: cores.len(),
            started,
        });
    }
    let is_spare = info.has_spare_core() && cores.len() > 1;
    if is_spare {
        cores.retain(|id| *id != apic::id());
    }
    log::info!("{} cores, TSC {} kHz", cores.len(), clocks.tsc_khz);
    let machine = Machine {
        clocks,
        cores,
        windows,
        node: info.node(),
    };
    if is_spare {
        MAIN.call_once(|| (machine.cores[0], spin::Mutex::new(Some(machine))));
        cpu::park()
    }
    viaduct_main(machine)
}

/// Gives all RAM behind the image to the heap, from the large page after it
/// so that the image's small pages and the heap's large ones don't meet.
fn claim_heap(info: &StartInfo) -> Option<Range<Hpa>> {
    let image_end = address(addr_of!(__image_end));
    let image_start = address(addr_of!(__image_start));
    let ram = info.ram_range_at(image_start)?;
    let range = image_end..ram.end.align_down(PAGE_SIZE);
    if range.is_empty() {
        return None;
    }
    let base = core::ptr::with_exposed_provenance_mut::<u8>(usize::try_from(range.start.0).ok()?);
    let len = usize::try_from(range.end.0 - range.start.0).ok()?;
    // SAFETY: the loader says that this is RAM, and nothing but the image,
    // which lies below, is in use; the loader's own structures lie below the
    // image (`StartInfo::read` has copied them anyway).
    unsafe { HEAP.lock().claim(Span::from_base_size(base, len)).ok()? };
    Some(range)
}

/// Processor features that the hypervisor itself relies on, and those that
/// every kernel switches on: TCG empties its TLB once more at each entry and
/// exit for which guest and host differ in one of these. Comes before global
/// pages are in use.
fn enable_features() {
    // SAFETY: no core takes interrupts yet, and device registers are mapped as
    // such in all tables of our own.
    unsafe { mtrr::leave_to_page_tables() };
    let mut wanted = Cr4Flags::PAGE_GLOBAL | Cr4Flags::PAGE_SIZE_EXTENSION;
    let cpuid = raw_cpuid::CpuId::new();
    if cpuid.get_feature_info().is_some_and(|it| it.has_xsave()) {
        wanted |= Cr4Flags::OSXSAVE;
    }
    if let Some(features) = cpuid.get_extended_feature_info() {
        if features.has_smep() {
            wanted |= Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION;
        }
        if features.has_smap() {
            wanted |= Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION;
        }
    }
    // SAFETY: global pages and XGETBV change nothing that exists so far, and
    // the hypervisor maps no page for user mode.
    unsafe { Cr4::update(|flags| flags.insert(wanted)) };
}

/// Bits of a physical address.
fn address_bits() -> u8 {
    let sizes = raw_cpuid::CpuId::new().get_processor_capacity_feature_info();
    // A processor that doesn't say has 36.
    sizes.map_or(36, |sizes| sizes.physical_address_bits())
}

/// A stack with a page below it; returns where that is.
fn new_stack() -> Hpa {
    zeroed_pages(usize::try_from(GUARDED_STACK / PAGE_SIZE).expect("a small number"))
}

/// Starts the other cores on these stacks; returns how many cores run, this
/// one included.
fn start_other_cores(stacks: &[Hpa], clocks: &Clocks) -> usize {
    if stacks.is_empty() {
        return 1;
    }
    trampoline::give_stacks(stacks);
    apic::start_all_others(trampoline::PAGE_NUMBER, |us| clocks.spin_us(us));
    // Generous: only a core that never comes makes us wait so long.
    for _ in 0..10_000 {
        if trampoline::started() == stacks.len() {
            break;
        }
        clocks.spin_us(1_000);
    }
    1 + trampoline::started()
}

/// What the other cores do once the boot core has prepared it.
static JOB: spin::Once<Job> = spin::Once::new();

/// The core that runs the image's main function in place of the boot core, and
/// what that gets.
static MAIN: spin::Once<(u8, spin::Mutex<Option<Machine>>)> = spin::Once::new();

/// A function that never returns.
type Job = &'static (dyn Fn() -> Infallible + Sync);

/// Lets the other cores go to work.
pub fn release_other_cores(job: Job) {
    JOB.call_once(|| job);
}

/// Where another core arrives, on its own stack and the final page tables.
extern "C" fn core_main() -> ! {
    descriptors::load();
    enable_features();
    if let Err(at) = apic::enable() {
        log::error!("a core's APIC window is at {at:#x}");
        io::exit(NodeExit::BootFailure);
    }
    trampoline::report_started();
    loop {
        if let Some(job) = JOB.get() {
            match job() {}
        }
        if let Some((core, machine)) = MAIN.get()
            && *core == apic::id()
            && let Some(machine) = machine.lock().take()
        {
            viaduct_main(machine)
        }
        core::hint::spin_loop();
    }
}

/// Ends the node because a core can't go on.
#[panic_handler]
#[cfg_attr(
    not(target_os = "none"),
    expect(dead_code, reason = "the host has its own")
)]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    cpu::interrupts_off();
    io::write_unlocked(format_args!("PANIC: {info}\n"));
    io::exit(NodeExit::Panic)
}
