//! A stand-in for a node, for tests of the launcher: takes QEMU's command
//! line and plays a hypervisor with a guest on the same regions and rings,
//! with no machine in it. Commands run on this host, by the guest's agent in
//! its `--serve` mode (`STAND_IN_AGENT`).
//!
//! `STAND_IN` says what goes wrong, on the node behind its `@` or on all: see
//! `main`.
#![expect(
    unsafe_code,
    reason = "an inherited socket and a mapping are taken over, a child is bound to us"
)]

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::ptr::NonNull;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::Signal;
use vmm_shared::addr::NodeId;
use vmm_shared::control::{
    ControlRegion, Counter, NodeShare, NodeState, RingId, VmState, first_places,
};
use vmm_shared::membership::TICK_MS;
use vmm_shared::region::{RegionError, RegionHeader, RegionKind};
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
    let node = node_id(&arguments);
    let fault = std::env::var("STAND_IN").unwrap_or_default();
    let fault = match fault.split_once('@') {
        Some((fault, at)) if at == node.0.to_string() => fault,
        Some(_) => "",
        None => &fault,
    };
    if arguments.iter().any(|argument| argument == "-S") {
        sleep_for_ever();
    }
    match fault {
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
    let control = match regions(&arguments, node) {
        Ok(control) => control,
        Err(why) => {
            println!("this node cannot start: {why}");
            return ExitCode::from(BOOT_FAILURE);
        }
    };
    let set_node = |state: NodeState| {
        let word = control.node_state(node).expect("below the most");
        word.store(state as u32, Ordering::Release);
    };
    let set_vm = |state: VmState| control.vm_state().store(state as u32, Ordering::Release);
    let membership = control.membership();
    let life = match membership.join(node) {
        Ok(life) => life,
        Err(why) => {
            println!("this node cannot start: {why}");
            return ExitCode::from(BOOT_FAILURE);
        }
    };
    std::thread::spawn(move || {
        while membership.is_in(life) {
            membership.beat(life);
            std::thread::sleep(Duration::from_millis(TICK_MS));
        }
    });
    println!("stand-in: joined");
    set_node(NodeState::Joined);
    if fault == "idle" {
        sleep_for_ever();
    }
    set_node(NodeState::Ready);
    let config = control.boot_config();
    count_exits(&control, &config.shares, node);
    if node != NodeId(0) {
        return serve(&control);
    }
    wait_for_others(&control, config.nodes);
    set_vm(VmState::Running);
    put(control.ring(RingId::ConsoleOut), b"stand-in: booting\r\n");
    match fault {
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

/// The VM starts when all nodes are ready.
fn wait_for_others(control: &ControlRegion, nodes: u32) {
    let is_ready = |node| {
        let state = control.node_state(NodeId(node)).expect("below the most");
        state.load(Ordering::Acquire) == NodeState::Ready as u32
    };
    let nodes = u16::try_from(nodes).expect("below the most");
    while !(0..nodes).all(is_ready) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The life of a node that only runs vCPUs: until the VM's end.
fn serve(control: &ControlRegion) -> ExitCode {
    loop {
        let state = VmState::from_raw(control.vm_state().load(Ordering::Acquire));
        if !matches!(state, Some(VmState::NotStarted | VmState::Running)) {
            return ExitCode::from(ORDERLY);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Counts 42 exits of the first vCPU, 43 of the next, and so on.
fn count_exits(control: &ControlRegion, shares: &[NodeShare], node: NodeId) {
    for (id, _) in first_places(shares).filter(|(_, at)| at.node == node) {
        let exits = control.counter(id, Counter::Exits).expect("below the most");
        exits.store(42 + u64::from(id.0), Ordering::Relaxed);
    }
}

fn sleep_for_ever() -> ! {
    loop {
        std::thread::park();
    }
}

/// Joins the agent's standard streams to the rings until it ends.
fn run_agent(control: &ControlRegion) {
    let program = std::env::var_os("STAND_IN_AGENT").expect("STAND_IN_AGENT names the agent");
    let mut agent = Command::new(program);
    agent
        .arg("--serve")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let node = rustix::process::getpid();
    // A guest ends with its node, whatever it was doing.
    let bind = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        match rustix::process::getppid() == Some(node) {
            true => Ok(()),
            false => Err(std::io::ErrorKind::BrokenPipe.into()),
        }
    };
    // SAFETY: the closure only makes system calls that are async-signal-safe.
    unsafe { agent.pre_exec(bind) };
    let mut agent = agent.spawn().expect("the agent starts");
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

fn node_id(arguments: &[String]) -> NodeId {
    let mut words = arguments.iter().flat_map(|argument| argument.split(' '));
    let id = words.find_map(|word| word.strip_prefix("node="));
    NodeId(id.and_then(|id| id.parse().ok()).expect("a node's id"))
}

/// Finds and checks all regions, as the hypervisor does; the control region,
/// or why this node can't take part.
fn regions(arguments: &[String], node: NodeId) -> Result<ControlRegion, String> {
    let refuse = |what: &str| {
        let what = what.to_owned();
        move |why: RegionError| format!("{what}: {why}")
    };
    let control = map(&control_file(arguments).ok_or("no doorbell server")?);
    let (kind, control_header) = RegionHeader::check(&control).map_err(refuse("control"))?;
    assert_eq!(kind, RegionKind::Control);
    let control = ControlRegion::new(control).ok_or("the control region is too small")?;
    let config = control.boot_config();

    let mut owners = Vec::new();
    for argument in arguments {
        let path = argument
            .split(',')
            .find_map(|word| word.strip_prefix("mem-path="));
        let (Some(path), true) = (path, argument.ends_with("share=on")) else {
            continue;
        };
        let file = File::options().read(true).write(true).open(path);
        let memory = map(&file.expect("inherited"));
        let (kind, header) = RegionHeader::check(&memory).map_err(refuse("memory"))?;
        if kind == RegionKind::Memory {
            assert_eq!(header.uuid, control_header.uuid);
            let share = config.shares[usize::try_from(header.owner).expect("small")];
            assert_eq!(header.content_len, share.room());
            owners.push(header.owner);
        }
    }
    assert!(owners.contains(&u32::from(node.0)), "{owners:?}");
    assert_eq!(owners.len(), usize::try_from(config.nodes).expect("small"));
    Ok(control)
}

fn map(file: &File) -> SharedMem {
    let mapping = memmap2::MmapRaw::map_raw(file).expect("a mapping");
    let mapping: &'static memmap2::MmapRaw = Box::leak(Box::new(mapping));
    let base = NonNull::new(mapping.as_mut_ptr()).expect("not at null");
    // SAFETY: 1. leaked, so mapped for ever; 2. page-aligned; 3. `MmapRaw`
    // makes no references.
    unsafe { SharedMem::new(base, mapping.len()) }
}

/// Gets the control region over the doorbell socket, as QEMU does; `None` if
/// nobody serves there.
fn control_file(arguments: &[String]) -> Option<File> {
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
        let received = recvmsg(&socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC);
        if received.expect("a message").bytes == 0 {
            return None;
        }
        let descriptor = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        if let (-1, Some(descriptor)) = (i64::from_le_bytes(bytes), descriptor) {
            // Kept open: the launcher would take a closed end for a lost node.
            std::mem::forget(socket);
            return Some(File::from(descriptor));
        }
    }
}
