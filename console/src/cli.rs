//! The command line, as operators type it.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use rack::{Guest, ModuleFile, NodeSpec, PlatformSpec, RackFile, RackSpec, RootFs, Size, VmSpec};

use crate::names::RackName;

mod change;

use change::CHANGE_STATUSES;
pub(crate) use change::{
    AddArgs, ChangeArgs, JobCommand, MoveArgs, NodeCommand, PolicyCommand, RemoveArgs, ResizeArgs,
    VcpuCommand,
};

const EXIT_STATUSES: &str = "\
Exit statuses:
  run, exec   the command's own; 128 + n if signal n killed it;
              126 if it cannot be run, 127 if it is not found in the guest
  run --guest IMAGE of multiboot or PVH
              (v << 1 | 1) & 255 if it wrote v to its exit port 0xf4;
              0 if it switched itself off; 124 if --timeout ended it
  others      0
  all         125 if Viaduct itself failed (one line on stderr says why);
              128 + n if Viaduct was ended by signal n (130: Ctrl-C)";

/// One virtual machine out of a rack of hosts.
#[derive(Debug, Parser)]
#[command(name = "viaduct", version, after_help = EXIT_STATUSES, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start a rack and a VM, run a command in it (or a shell), stop all.
    ///
    /// Standard output and error are the command's alone; standard input goes
    /// to it.
    #[command(after_help = EXIT_STATUSES)]
    Run(RunArgs),
    /// Start a rack and a VM in the background; returns when the VM is up.
    Up(UpArgs),
    /// Run a command (or a shell) in the running VM.
    #[command(after_help = EXIT_STATUSES)]
    Exec(ExecArgs),
    /// Attach to the running VM's serial console. Ctrl-] detaches.
    Console(ConsoleArgs),
    /// Switch the VM off and stop the rack.
    Down(DownArgs),
    /// What is running, and how it is.
    Status(StatusArgs),
    /// The rack's nodes.
    Nodes(ShowArgs),
    /// The VM's vCPUs and what they have counted.
    Vcpus(ShowArgs),
    /// Change the running VM's memory past the cluster's tables.
    #[command(subcommand, hide = true)]
    Direct(DirectCommand),
    /// The VM's memory and the nodes that give it.
    Memory(ShowArgs),
    /// Change the VM's size while it runs.
    ///
    /// Waits until the guest has confirmed it, unless --no-wait is given.
    #[command(after_help = CHANGE_STATUSES)]
    Resize(ResizeArgs),
    /// Place the VM as it is anew, by the policy.
    #[command(after_help = CHANGE_STATUSES)]
    Rebalance(ChangeArgs),
    /// Keep a node free, empty it, or let it come and go.
    #[command(subcommand)]
    Node(NodeCommand),
    /// Whether a vCPU is there, and where it runs.
    #[command(subcommand)]
    Vcpu(VcpuCommand),
    /// Changes that take time.
    #[command(subcommand)]
    Job(JobCommand),
    /// The placement policy: see docs/policy.md.
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// The rack at a glance, live; q quits.
    Top(TopArgs),
    /// Who changed what, and what came of it.
    Events(EventsArgs),
    /// Why the VM is where it is, or why it can't be of another size.
    Explain(ExplainArgs),
    /// Run a built tree of kvm-unit-tests, and compare with plain QEMU.
    ///
    /// The exit status is 1 if a test fails that passes without Viaduct.
    KvmUnitTests(UnitTestArgs),
    /// Check the SVM of the platform below by micro-guests, feature by feature.
    ///
    /// The exit status is 0 if what it finds is what is known of a platform.
    Selftest(SelftestArgs),
    /// Print a script by which a shell completes this command line.
    ///
    /// For bash: source <(viaduct completion bash)
    Completion(CompletionArgs),
    /// Holds a rack for `up`.
    #[command(hide = true)]
    Supervise,
}

#[derive(Debug, Args)]
pub(crate) struct Target {
    /// Name of the rack; several can be up side by side.
    #[arg(long, value_name = "NAME", default_value = "default")]
    pub name: RackName,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Rack")]
pub(crate) struct RackArgs {
    /// Nodes that give the VM cores and memory, 1 to 8.
    #[arg(long, value_name = "N", default_value_t = 1)]
    nodes: u32,
    /// Further nodes that decide which node gives what, and give nothing
    /// themselves. Without any, the VM keeps the shape that it starts with.
    #[arg(long, value_name = "N", default_value_t = 0)]
    control: u32,
    /// Cores of each node.
    #[arg(long, value_name = "C", default_value_t = 2)]
    cores: u32,
    /// The most memory that each node gives [default: what the VM asks for].
    #[arg(long, value_name = "SIZE")]
    node_memory: Option<Size>,
    /// Read the rack from a file with a [[node]] table for each node.
    #[arg(long, value_name = "FILE.toml", conflicts_with_all = ["nodes", "control", "cores", "node_memory"])]
    rack: Option<PathBuf>,
}

impl RackArgs {
    pub(crate) fn spec(&self) -> Result<RackSpec, rack::RackError> {
        match &self.rack {
            Some(path) => RackFile::read(path),
            None => RackSpec::equal(self.nodes, NodeSpec::data(self.cores, self.node_memory))?
                .with_control(self.control),
        }
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "VM")]
pub(crate) struct VmArgs {
    /// vCPUs [default: all cores of the rack].
    #[arg(long, value_name = "N")]
    vcpus: Option<u32>,
    /// vCPUs that there is room for while the VM runs [default for "linux": all
    /// cores of the rack; else none but --vcpus].
    #[arg(long, value_name = "N")]
    max_vcpus: Option<u32>,
    /// Memory, a multiple of 2M.
    #[arg(long, value_name = "SIZE", default_value = "1G")]
    memory: Size,
    /// "linux" (Debian's kernel), "pv", a bzImage, or an image that runs
    /// without a kernel: ELF with a multiboot 1 header or a PVH note.
    #[arg(long, value_name = "linux|pv|IMAGE", default_value = "linux")]
    pub guest: Guest,
    /// "debian", "busybox", or an ext4 image.
    #[arg(long, value_name = "busybox|debian|PATH", default_value = "debian")]
    pub rootfs: RootFs,
    /// "lean", or "legacy" for a PC's interval timer, interrupt controllers,
    /// clock and ACPI timer.
    #[arg(long, value_name = "lean|legacy", default_value = "lean")]
    pub platform: PlatformSpec,
    /// Give a multiboot or PVH image this file as its next module; words behind
    /// a blank are the module's command line.
    #[arg(long = "module", value_name = "FILE [WORDS]")]
    pub modules: Vec<ModuleFile>,
    /// Boot this initial RAM file system instead of Viaduct's own.
    #[arg(long, value_name = "FILE")]
    pub initramfs: Option<PathBuf>,
    /// More words for the kernel command line.
    #[arg(
        long,
        value_name = "WORDS",
        default_value = "",
        allow_hyphen_values = true
    )]
    pub append: String,
    /// Give up if the VM is not up after so many seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 180)]
    pub boot_timeout: u64,
    /// Show the nodes' logs and the guest's console on stderr.
    #[arg(long, short)]
    pub verbose: bool,
}

impl VmArgs {
    pub(crate) fn spec(&self, rack: &RackSpec) -> VmSpec {
        let vcpus = self.vcpus.unwrap_or(rack.cores());
        let room = match self.guest {
            Guest::Linux => vcpus.max(rack.cores()),
            Guest::Pv | Guest::Image(_) => vcpus,
        };
        VmSpec {
            vcpus,
            max_vcpus: self.max_vcpus.unwrap_or(room),
            memory: self.memory,
        }
    }
}

/// Seconds that a guest gets to take or give memory.
const CHANGE_SECONDS: u64 = 60;

#[derive(Debug, Subcommand)]
pub(crate) enum DirectCommand {
    /// Give the guest memory of a node, or ask for memory back that it got so.
    Memory {
        #[command(flatten)]
        amount: Amount,
        /// The node.
        #[arg(long, value_name = "N")]
        on: u16,
        #[command(flatten)]
        args: DirectArgs,
    },
    /// Move memory from one node to another while the guest runs.
    Slices {
        /// The node that gives it.
        #[arg(long, value_name = "N")]
        from: u16,
        /// The node that is to give it.
        #[arg(long, value_name = "N")]
        to: u16,
        /// Pieces of 2 MiB [default: all].
        #[arg(long, value_name = "N", default_value_t = u32::MAX, hide_default_value = true)]
        count: u32,
        #[command(flatten)]
        args: DirectArgs,
    },
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Amount {
    /// So much more: whole blocks of 128M.
    #[arg(long, value_name = "SIZE")]
    pub add: Option<Size>,
    /// So much less.
    #[arg(long, value_name = "SIZE")]
    pub remove: Option<Size>,
}

#[derive(Debug, Args)]
pub(crate) struct DirectArgs {
    #[command(flatten)]
    pub target: Target,
    /// Give up waiting after so many seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = CHANGE_SECONDS)]
    pub timeout: u64,
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Give the rack a name, so that other commands can reach it while it
    /// runs.
    #[arg(long, value_name = "NAME")]
    pub name: Option<RackName>,
    #[command(flatten)]
    pub rack: RackArgs,
    #[command(flatten)]
    pub vm: VmArgs,
    /// Give the command a terminal.
    #[arg(long, short)]
    pub tty: bool,
    /// End a VM that runs a multiboot or PVH image after so many seconds, and
    /// say where it was.
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
    /// Attach to the VM's serial console, and run nothing; ends with the VM.
    #[arg(long, conflicts_with_all = ["command", "tty"])]
    pub console: bool,
    /// The command and its arguments; a shell on a terminal if there is none.
    /// For a multiboot or PVH image, its arguments.
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// Where results go besides standard output.
#[derive(Debug, Args)]
pub(crate) struct ResultFiles {
    /// Write the results as TAP.
    #[arg(long, value_name = "FILE")]
    pub tap: Option<PathBuf>,
    /// Write the results as JUnit XML.
    #[arg(long, value_name = "FILE")]
    pub junit: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct UnitTestArgs {
    /// The tree, configured for x86_64 and built.
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
    /// Only tests with this in their name, or of this group.
    #[arg(long, value_name = "WORD")]
    pub filter: Option<String>,
    /// Nodes in the rack of a test that has as many vCPUs.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    pub nodes: u32,
    /// Seconds for each test [default: what the tree says, or 90].
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
    /// Don't run what fails under plain QEMU, too: all failures are ours.
    #[arg(long)]
    pub no_reference: bool,
    #[command(flatten)]
    pub files: ResultFiles,
    /// Say how each test ends when it does, and print what those printed that
    /// did not pass.
    #[arg(long, short)]
    pub verbose: bool,
}

#[derive(Debug, Args)]
pub(crate) struct SelftestArgs {
    /// Only cases with this in their name.
    #[arg(long, value_name = "WORD")]
    pub filter: Option<String>,
    /// 2 also checks what several nodes need of their hosts.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=2))]
    pub nodes: u32,
    /// Compare with this known platform [default: the one that fits best].
    #[arg(long, value_name = "NAME")]
    pub platform: Option<String>,
    /// Seconds for each case.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub timeout: u64,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub files: ResultFiles,
    /// List what passed, too.
    #[arg(long, short)]
    pub verbose: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CompletionArgs {
    /// The shell.
    pub shell: clap_complete::Shell,
}

#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    #[command(flatten)]
    pub target: Target,
    #[command(flatten)]
    pub rack: RackArgs,
    #[command(flatten)]
    pub vm: VmArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    #[command(flatten)]
    pub target: Target,
    /// Give the command a terminal.
    #[arg(long, short)]
    pub tty: bool,
    /// The command and its arguments; a shell on a terminal if there is none.
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct ConsoleArgs {
    #[command(flatten)]
    pub target: Target,
    /// Print what the console has kept, and end.
    #[arg(long)]
    pub no_follow: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DownArgs {
    #[command(flatten)]
    pub target: Target,
    /// Seconds that the guest gets to switch itself off; then it is stopped.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub timeout: u64,
}

#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    pub show: ShowArgs,
    /// Show what each vCPU has counted, too.
    #[arg(long, short)]
    pub verbose: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ShowArgs {
    #[command(flatten)]
    pub target: Target,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    #[command(flatten)]
    pub target: Target,
    /// Print JSON instead, a line each half second.
    #[arg(long)]
    pub json: bool,
    /// End after so many lines.
    #[arg(long, value_name = "N", requires = "json")]
    pub count: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct EventsArgs {
    #[command(flatten)]
    pub show: ShowArgs,
    /// Go on, and print events as they come.
    #[arg(long, short)]
    pub follow: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {
    /// As if it had so many vCPUs.
    #[arg(long, value_name = "N")]
    pub vcpus: Option<u32>,
    /// As if it had so much memory.
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<Size>,
    #[command(flatten)]
    pub show: ShowArgs,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    fn run(words: &[&str]) -> RunArgs {
        let line = ["viaduct", "run"].iter().chain(words);
        match Cli::try_parse_from(line).expect("legal").command {
            Command::Run(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_stands_behind_the_dashes_is_the_commands() {
        let args = run(&["--vcpus", "1", "--", "sh", "-c", "--memory x", "--"]);
        assert_eq!(args.command, ["sh", "-c", "--memory x", "--"]);
        assert!(run(&[]).command.is_empty());
    }

    #[test]
    fn there_is_room_for_as_many_vcpus_as_cores() {
        let room = |words: &[&str]| {
            let args = run(words);
            let vm = args.vm.spec(&args.rack.spec().expect("legal"));
            (vm.vcpus, vm.max_vcpus)
        };
        assert_eq!(room(&["--cores", "4", "--vcpus", "1"]), (1, 4));
        assert_eq!(room(&["--cores", "2", "--vcpus", "5"]), (5, 5));
        assert_eq!(room(&["--vcpus", "1", "--guest", "pv"]), (1, 1));
        assert_eq!(room(&["--vcpus", "1", "--max-vcpus", "9"]), (1, 9));
    }

    #[test]
    fn the_defaults_are_those_of_the_contract() {
        let args = run(&[]);
        let rack = args.rack.spec().expect("legal");
        assert_eq!(rack, RackSpec::default());
        let vm = args.vm.spec(&rack);
        assert_eq!((vm.vcpus, vm.memory), (2, Size::mib(1024)));
        assert_eq!(args.vm.rootfs, RootFs::Debian);
        assert_eq!(
            run(&["--cores", "4"])
                .vm
                .spec(&run(&["--cores", "4"]).rack.spec().expect("legal"))
                .vcpus,
            4
        );
    }

    #[test]
    fn unknown_options_and_stray_words_are_refused() {
        for line in [
            &["viaduct", "run", "--nope"][..],
            &["viaduct", "run", "stray"],
            &["viaduct", "run", "--memory", "lots"],
            &["viaduct", "up", "--name", "../x"],
            &["viaduct", "fly"],
            &["viaduct"],
        ] {
            assert!(Cli::try_parse_from(line).is_err(), "{line:?}");
        }
    }
}
