//! A rack with a VM in it, from the operator's wishes to a guest that answers.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use guest_linux_config::agent_client::{AgentClient, ClientError};
use guest_linux_config::command_line::command_line;
use guest_linux_config::{Images, KernelSource, Root, Stage};
use rack::{
    Accelerator, BootBySpec, BootFiles, Faults, Guest, LogSink, PlatformSpec, Programs, Protocol,
    Rack, RackError, RackSpec, RootFs, StartOptions, VmSpec, beside_executable,
};
use serde::{Deserialize, Serialize};

use crate::cli::{RackArgs, VmArgs};
use crate::progress;
use crate::sample;

/// How long all nodes get to come into service and enter the VM: firmware and
/// hypervisor, no guest.
const SERVICE_LIMIT: Duration = Duration::from_secs(60);

/// Everything that is needed to start, settled and checked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub rack: RackSpec,
    pub vm: VmSpec,
    pub boot: BootFiles,
    pub boot_timeout: Duration,
    pub verbose: bool,
}

impl Plan {
    /// Settles what to start, and builds the images that are missing.
    /// `arguments` are those of a bare-metal image.
    pub(crate) fn make(rack: &RackArgs, vm: &VmArgs, arguments: &[OsString]) -> Result<Self> {
        let rack = rack.spec()?;
        let spec = vm.spec(&rack);
        // Everything that is cheap to check comes before anything is built.
        rack.check(&spec)?;
        let programs = Programs::find();
        programs.check()?;
        Accelerator::pick()?;
        Ok(Self {
            rack,
            vm: spec,
            boot: match bare_image(vm)? {
                Some(image) => bare_files(image, vm, arguments)?,
                None => boot_files(vm)?,
            },
            boot_timeout: Duration::from_secs(vm.boot_timeout),
            verbose: vm.verbose,
        })
    }
}

/// What the paravirtual guest boots: our kernel, the agent as its first
/// program, and a root that the kernel itself reads.
fn pv_boot_files(vm: &VmArgs) -> Result<BootFiles> {
    if vm.platform != PlatformSpec::Lean {
        bail!("--guest pv has no old devices; use --platform lean");
    }
    let image = match &vm.rootfs {
        RootFs::Busybox => {
            bail!("--guest pv has no busybox root; use --rootfs debian or an ext4 image")
        }
        RootFs::Debian => Images::open(None, |stage, detail| {
            progress::say(stage_text(stage, detail));
        })?
        .debian_root()?,
        RootFs::Path(path) => path.clone(),
    };
    let words = ["viaduct.root=ready", vm.append.trim()];
    Ok(BootFiles {
        kernel: built(
            "VIADUCT_GUEST_KERNEL",
            "x86_64-unknown-none/release/guest-kernel",
            "pv guest kernel",
            "build it with scripts/viaduct, or set VIADUCT_GUEST_KERNEL to its path",
        )?,
        boot_by: BootBySpec::Paravirtual,
        initramfs: Some(match &vm.initramfs {
            Some(path) => path.clone(),
            None => agent()?,
        }),
        modules: Vec::new(),
        platform: vm.platform,
        image: Some(image),
        command_line: words.join(" ").trim_end().to_owned(),
    })
}

/// The image, if it runs without a kernel.
pub(crate) fn bare_image(vm: &VmArgs) -> Result<Option<(&Path, Protocol)>> {
    let Guest::Image(path) = &vm.guest else {
        return Ok(None);
    };
    Ok(match BootFiles::protocol(path)? {
        Protocol::Linux => None,
        protocol => Some((path, protocol)),
    })
}

/// What a bare-metal image boots from: itself and its modules.
fn bare_files(
    (image, protocol): (&Path, Protocol),
    vm: &VmArgs,
    arguments: &[OsString],
) -> Result<BootFiles> {
    if vm.initramfs.is_some() {
        bail!("--initramfs is for Linux; give a multiboot or PVH image its files with --module");
    }
    let mut words = Vec::new();
    // By multiboot's custom, which many programs rely on.
    if protocol == Protocol::Multiboot {
        words.push(image.to_string_lossy().into_owned());
    }
    words.extend((!vm.append.is_empty()).then(|| vm.append.clone()));
    for argument in arguments {
        let argument = argument
            .to_str()
            .context("the image's arguments are not UTF-8")?;
        words.push(argument.to_owned());
    }
    Ok(BootFiles {
        kernel: image.to_owned(),
        boot_by: BootBySpec::Image,
        initramfs: None,
        modules: vm.modules.clone(),
        platform: vm.platform,
        image: None,
        command_line: words.join(" "),
    })
}

fn boot_files(vm: &VmArgs) -> Result<BootFiles> {
    if !vm.modules.is_empty() {
        bail!("--module is for multiboot and PVH images; leave it out");
    }
    if let RootFs::Path(path) = &vm.rootfs {
        rack::boot::check_readable(
            "root image",
            path,
            "give \"busybox\", \"debian\" or an ext4 image to --rootfs",
        )?;
    }
    let source = match &vm.guest {
        Guest::Image(path) => KernelSource::File(path.clone()),
        Guest::Linux => KernelSource::Debian,
        Guest::Pv => return pv_boot_files(vm),
    };
    let root = match vm.rootfs {
        RootFs::Busybox => Root::Busybox,
        RootFs::Debian | RootFs::Path(_) => Root::Pmem,
    };
    let files = |kernel, initramfs, image| BootFiles {
        kernel,
        boot_by: BootBySpec::Image,
        initramfs: Some(initramfs),
        modules: Vec::new(),
        platform: vm.platform,
        image,
        command_line: command_line(root, &vm.append),
    };
    // With everything given, nothing is built, and no cache is needed.
    match (&vm.guest, &vm.initramfs, &vm.rootfs) {
        (Guest::Image(kernel), Some(initramfs), RootFs::Busybox) => {
            return Ok(files(kernel.clone(), initramfs.clone(), None));
        }
        (Guest::Image(kernel), Some(initramfs), RootFs::Path(image)) => {
            return Ok(files(
                kernel.clone(),
                initramfs.clone(),
                Some(image.clone()),
            ));
        }
        _ => {}
    }
    let images = Images::open(None, |stage, detail| {
        progress::say(stage_text(stage, detail));
    })?;
    let kernel = images.kernel(&source)?;
    let initramfs = match &vm.initramfs {
        Some(path) => path.clone(),
        None => images.initramfs(&agent()?, root, &source)?,
    };
    let image = match &vm.rootfs {
        RootFs::Busybox => None,
        RootFs::Debian => Some(images.debian_root()?),
        RootFs::Path(path) => Some(path.clone()),
    };
    Ok(files(kernel, initramfs, image))
}

fn stage_text(stage: Stage, detail: &str) -> String {
    let what = match stage {
        Stage::Waiting => "waiting for another build",
        Stage::Kernel => "fetching the guest kernel",
        Stage::Initramfs => "building the initial RAM file system",
        Stage::DebianRoot => "building the Debian root (once)",
    };
    if detail.is_empty() {
        return what.to_owned();
    }
    format!("{what}: {detail}")
}

/// The program that runs commands in the guest.
fn agent() -> Result<PathBuf, RackError> {
    built(
        "VIADUCT_AGENT",
        "x86_64-unknown-linux-musl/release/viaduct-agent",
        "guest agent",
        "build it with scripts/viaduct, or set VIADUCT_AGENT to its path",
    )
}

/// A file that the build has made, or that `variable` names instead.
fn built(
    variable: &str,
    path: &str,
    what: &'static str,
    hint: &'static str,
) -> Result<PathBuf, RackError> {
    let named = std::env::var_os(variable).filter(|path| !path.is_empty());
    let path = named.map_or_else(|| beside_executable(path), PathBuf::from);
    rack::boot::check_readable(what, &path, hint)?;
    Ok(path)
}

/// A running rack and the way to its guest.
#[derive(Debug)]
pub(crate) struct Machine {
    pub rack: Arc<Rack>,
    pub agent: AgentClient,
}

impl Machine {
    /// Starts the rack. The guest need not answer yet: see
    /// [`wait_up`](Self::wait_up).
    pub(crate) fn start(plan: &Plan, name: &str, log: Option<LogSink>) -> Result<Self> {
        progress::say("starting the rack");
        let options = StartOptions {
            name: name.to_owned(),
            programs: Programs::find(),
            accelerator: Accelerator::pick()?,
            log,
            faults: Faults::from_env()?,
        };
        let rack = Rack::start(&plan.rack, &plan.vm, &plan.boot, options)?;
        let (reader, writer) = rack.agent();
        Ok(Self {
            rack: Arc::new(rack),
            agent: AgentClient::new(reader, writer),
        })
    }

    /// Waits until the VM has been entered.
    pub(crate) fn wait_entered(&self, plan: &Plan) -> Result<()> {
        progress::say("starting the hypervisor");
        self.rack.wait_ready(SERVICE_LIMIT.min(plan.boot_timeout))?;
        Ok(())
    }

    /// Waits until the guest takes commands.
    pub(crate) fn wait_up(&self, plan: &Plan) -> Result<()> {
        let deadline = Instant::now() + plan.boot_timeout;
        self.wait_entered(plan)?;
        progress::say("booting the guest");
        let left = deadline.saturating_duration_since(Instant::now());
        match self.agent.wait_hello(left) {
            Ok(()) => return Ok(self.rack.guest_is_up()?),
            Err(ClientError::NoAnswer(_)) => {}
            Err(error) => {
                self.explain()?;
                return Err(error.into());
            }
        }
        let seconds = plan.boot_timeout.as_secs();
        let said = match self.rack.console().verdict() {
            Some(line) => format!("its console says: {line}"),
            None => "its console is empty".to_owned(),
        };
        bail!(
            "the guest did not answer within {seconds} s: {said}; {}; use a longer --boot-timeout, \
             or see more with -v",
            sample::vcpus(&self.rack)
        )
    }

    /// An error that says why the rack has ended, if it has.
    pub(crate) fn explain(&self) -> Result<()> {
        // The connection may be seen to fail shortly before the node's end.
        match self.rack.wait_end(Duration::from_millis(500)) {
            Some(end) => Err(self.rack.failure(&end).into()),
            None => Ok(()),
        }
    }

    /// Switches the guest off, gently if it takes no longer than `limit`.
    pub(crate) fn power_off(&self, limit: Duration) {
        let agent = self.agent.clone();
        // In a thread of its own: it blocks if the guest hangs.
        drop(std::thread::spawn(move || drop(agent.power_off())));
        // Whoever still runs then has nothing to save.
        let _ = self.rack.wait_end(limit);
        self.rack.stop(Duration::from_secs(5));
    }
}
