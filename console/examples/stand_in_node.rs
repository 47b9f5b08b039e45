//! A stand-in for a node, for tests of the launcher: takes QEMU's command
//! line and plays a hypervisor with a guest on the same regions and rings,
//! with no machine in it. Commands run on this host, by the guest's agent in
//! its `--serve` mode (`STAND_IN_AGENT`).
//!
//! `STAND_IN` says what goes wrong: see `main`.
#![expect(
    unsafe_code,
    reason = "an inherited socket and a mapping are taken over"
)]

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, ExitCode, Stdio};
use std::ptr::NonNull;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vmm_shared::addr::{NodeId, VcpuId};
use vmm_shared::control::{ControlRegion, Counter, NodeState, RingId, VmState};
use vmm_shared::region::{RegionHeader, RegionKind};
use vmm_shared::ring::ByteRing;
use vmm_shared::shm::SharedMem;

/// What the hypervisor's exit port makes of 0x10, 0x11 and 0x12.
const ORDERLY: u8 = 0x21;
const BOOT_FAILURE: u8 = 0x23;
const PANIC: u8 = 0x25;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if arguments.iter().any(|argument| argument == "--version") {
        println!("QEMU emulator version 99.0 (a stand-in)");
        return ExitCode::SUCCESS;
    }
    let fault = std::env::var("STAND_IN").unwrap_or_default();
    match fault.as_str() {
        "qemu-error" => {
            eprintln!("qemu-system-x86_64: cannot set up guest memory");
            return ExitCode::FAILURE;
        }
        "boot-failure" => {
            println!("boot: this CPU has no SVM; use another");
            return ExitCode::from(BOOT_FAILURE);
        }
        "panic" => {
            println!("panicked at src/main.rs:1: broken invariant");
            return ExitCode::from(PANIC);
        }
        "silent" => sleep_for_ever(),
        _ => {}
    }
    let control = control_region(&arguments);
    let set_node = |state: NodeState| {
        let word = control.node_state(NodeId(0)).expect("below the most");
        word.store(state as u32, Ordering::Release);
    };
    let set_vm = |state: VmState| control.vm_state().store(state as u32, Ordering::Release);
    println!("stand-in: joined");
    set_node(NodeState::Ready);
    set_vm(VmState::Running);
    let exits = control.counter(VcpuId(0), Counter::Exits);
    exits.expect("below the most").store(42, Ordering::Relaxed);
    put(control.ring(RingId::ConsoleOut), b"stand-in: booting\r\n");
    match fault.as_str() {
        "hang" => sleep_for_ever(),
        "crash" => {
            put(control.ring(RingId::ConsoleOut), b"Kernel panic: oh no\r\n");
            set_vm(VmState::Crashed);
            return ExitCode::from(ORDERLY);
        }
        _ => {}
    }
    // What is typed on the console is echoed.
    let (typed, shown) = (
        control.ring(RingId::ConsoleIn),
        control.ring(RingId::ConsoleOut),
    );
    std::thread::spawn(move || {
        let mut buffer = [0; 256];
        loop {
            let count = get(typed, &mut buffer);
            put(shown, &buffer[..count]);
        }
    });
    run_agent(&control);
    set_vm(VmState::PoweredOff);
    set_node(NodeState::Stopped);
    ExitCode::from(ORDERLY)
}

fn sleep_for_ever() -> ! {
    loop {
        std::thread::park();
    }
}

/// Joins the agent's standard streams to the rings until it ends.
fn run_agent(control: &ControlRegion) {
    let program = std::env::var_os("STAND_IN_AGENT").expect("STAND_IN_AGENT names the agent");
    let mut agent = Command::new(program)
        .arg("--serve")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the agent starts");
    let mut stdin = agent.stdin.take().expect("piped");
    let mut stdout = agent.stdout.take().expect("piped");
    let (input, output) = (
        control.ring(RingId::AgentIn),
        control.ring(RingId::AgentOut),
    );
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let count = get(input, &mut buffer);
            if stdin.write_all(&buffer[..count]).is_err() {
                return;
            }
        }
    });
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = stdout.read(&mut buffer) {
        put(output, &buffer[..count]);
    }
    drop(agent.wait());
}

fn put(ring: ByteRing, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let count = ring.write(bytes);
        bytes = &bytes[count..];
        if count == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn get(ring: ByteRing, into: &mut [u8]) -> usize {
    loop {
        let count = ring.read(into);
        if count > 0 {
            return count;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Gets the control region over the doorbell socket, as QEMU does.
fn control_region(arguments: &[String]) -> ControlRegion {
    let number = arguments
        .iter()
        .find_map(|argument| argument.strip_prefix("socket,id=doorbell,fd="))
        .and_then(|number| number.parse().ok())
        .expect("a doorbell socket");
    // SAFETY: inherited for this purpose, and nobody else's.
    let socket = UnixStream::from(unsafe { OwnedFd::from_raw_fd(number) });
    loop {
        let mut bytes = [0; 8];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        recvmsg(&socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC).expect("a message");
        let descriptor = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        if let (-1, Some(descriptor)) = (i64::from_le_bytes(bytes), descriptor) {
            let file = File::from(descriptor);
            let mapping = memmap2::MmapRaw::map_raw(&file).expect("a mapping");
            let mapping: &'static memmap2::MmapRaw = Box::leak(Box::new(mapping));
            let base = NonNull::new(mapping.as_mut_ptr()).expect("not at null");
            // SAFETY: 1. leaked, so mapped for ever; 2. page-aligned; 3.
            // `MmapRaw` makes no references.
            let memory = unsafe { SharedMem::new(base, mapping.len()) };
            let (kind, _) = RegionHeader::check(&memory).expect("a region");
            assert_eq!(kind, RegionKind::Control);
            return ControlRegion::new(memory).expect("large enough");
        }
    }
}
