//! Booting a guest and judging how it ended.

use std::path::PathBuf;

use rack::{
    Accelerator, BootBySpec, BootFiles, ConsoleRead, Faults, NodeEnd, NodeSpec, PlatformSpec,
    Programs, Rack, RackEnd, RackSpec, Size, StartOptions, VmSpec,
};
use vmm_shared::addr::NodeId;
use vmm_shared::control::VmState;

use super::{Assembled, Finished, Guest};
use crate::{LIMIT, Turn, hypervisor};

/// How a guest has to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// It finds all as it should be and switches itself off.
    Pass,
    /// Its vCPU shuts down, and the hypervisor reports that.
    Crash,
    /// One of these two: processors differ.
    PassOrCrash,
    /// It resets itself.
    Reset,
    /// It says READY and then never ends by itself; the launcher ends it.
    Stay,
}

/// The VM that a case wants.
#[derive(Clone, Debug)]
pub struct Machine {
    /// vCPUs.
    pub vcpus: u32,
    /// The root image, if it wants one.
    pub image: Option<PathBuf>,
}

impl Default for Machine {
    fn default() -> Self {
        Self {
            vcpus: 1,
            image: None,
        }
    }
}

/// The least that a VM can have.
const MEMORY: Size = Size::mib(128);

/// Assembles a guest, boots it and fails unless it ends as expected, with the
/// hypervisor in order.
///
/// # Panics
/// With what the guest said.
#[track_caller]
pub fn check(machine: &Machine, expect: Expect, case: impl FnOnce(&mut Guest) -> Assembled) {
    let Finished { image, checks } = assemble(case);
    let _turn = Turn::wait();
    let folder = tempfile::tempdir().expect("a folder");
    let kernel = folder.path().join("guest");
    std::fs::write(&kernel, image).expect("writable");
    let rack = start(machine, kernel);
    let mut said = String::new();
    let end = match expect {
        Expect::Stay => {
            read_console(&rack, &mut said, |said| said.contains("READY"));
            assert_eq!(rack.ended(), None, "{said}");
            rack.kill();
            rack.wait_end(LIMIT)
        }
        _ => rack.wait_end(LIMIT),
    };
    let Some(end) = end else {
        rack.kill();
        read_console(&rack, &mut said, |_| false);
        panic!("it hangs; it said {said:?}");
    };
    read_console(&rack, &mut said, |_| false);
    let log = rack.log(NodeId(0)).join("\n");
    if let Some(failed) = said.lines().find_map(|line| line.strip_prefix("FAIL ")) {
        let number = failed.split(' ').next().unwrap_or_default();
        let number = usize::from_str_radix(number, 16).unwrap_or(usize::MAX);
        let what = checks.get(number).map_or("?", String::as_str);
        panic!("{what}: (check, vector, error, RIP, RAX) {failed}\n{log}");
    }
    judge(expect, &end, &said, &log);
}

#[track_caller]
fn judge(expect: Expect, end: &RackEnd, said: &str, log: &str) {
    let how = (end.how, end.vm);
    let expect = match (expect, end.vm) {
        (Expect::PassOrCrash, VmState::Crashed) => Expect::Crash,
        (Expect::PassOrCrash, _) => Expect::Pass,
        _ => expect,
    };
    let expected = match expect {
        Expect::Pass | Expect::PassOrCrash => (NodeEnd::Orderly, VmState::PoweredOff),
        Expect::Crash => (NodeEnd::Orderly, VmState::Crashed),
        Expect::Reset => (NodeEnd::Orderly, VmState::Reset),
        Expect::Stay => (NodeEnd::Killed(9), VmState::Running),
    };
    assert_eq!(how, expected, "said {said:?}, log:\n{log}");
    match expect {
        Expect::Pass | Expect::PassOrCrash => {
            assert!(said.ends_with("PASS\r\n"), "{said:?}");
        }
        Expect::Crash => assert!(log.contains("the VM has crashed"), "{log}"),
        Expect::Reset | Expect::Stay => {}
    }
    assert!(!log.contains("panic"), "{log}");
}

fn assemble(case: impl FnOnce(&mut Guest) -> Assembled) -> Finished {
    let finished = Guest::new().and_then(|mut guest| {
        case(&mut guest)?;
        guest.finish()
    });
    finished.expect("the guest can be assembled")
}

fn start(machine: &Machine, kernel: PathBuf) -> Rack {
    let node = NodeSpec::data(machine.vcpus, None);
    let spec = RackSpec { nodes: vec![node] };
    let vm = VmSpec {
        max_vcpus: machine.vcpus,
        vcpus: machine.vcpus,
        memory: MEMORY,
    };
    let boot = BootFiles {
        kernel,
        boot_by: BootBySpec::Image,
        initramfs: None,
        modules: Vec::new(),
        platform: PlatformSpec::Lean,
        image: machine.image.clone(),
        command_line: String::new(),
    };
    let options = StartOptions {
        name: "guest".into(),
        programs: Programs {
            hypervisor: hypervisor(),
            ..Programs::find()
        },
        accelerator: Accelerator::pick().expect("there is always emulation"),
        log: None,
        faults: Faults::default(),
    };
    Rack::start(&spec, &vm, &boot, options).expect("the rack starts")
}

/// Reads what the guest prints until there is enough of it or its end.
fn read_console(rack: &Rack, said: &mut String, enough: impl Fn(&str) -> bool) {
    let console = rack.console();
    let mut position = said.len() as u64;
    let mut buffer = [0; 4096];
    while !enough(said) {
        match console.read(&mut position, &mut buffer, LIMIT) {
            ConsoleRead::Bytes(count) => said.push_str(&String::from_utf8_lossy(&buffer[..count])),
            ConsoleRead::Timeout => panic!("it is silent; it said {said:?}"),
            ConsoleRead::Closed => return,
        }
    }
}
