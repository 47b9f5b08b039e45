//! `viaduct`: the operator's console.

mod attach;
mod bare;
mod change;
mod cli;
mod client;
#[cfg(test)]
mod documented;
mod machine;
mod names;
mod progress;
mod protocol;
mod relay;
mod report;
mod run;
mod sample;
mod selftest;
mod server;
mod session;
mod show;
mod signals;
mod stdio;
mod supervise;
mod tables;
mod terminal;
mod top;
mod unit_tests;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use guest_linux_config::agent_client::AgentClient;
use rack::Size;

use cli::{Cli, Command, ConsoleArgs, DirectCommand, ExecArgs, ShowArgs, StatusArgs, UpArgs};
use machine::Plan;
use protocol::{Direct, Report};
use session::Outcome;

/// The exit status for Viaduct's own failures, as that of `docker run`.
const FAILED: u8 = 125;

fn main() -> ExitCode {
    terminal::restore_on_panic();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let result = signals::install().and_then(|()| dispatch(cli));
    signals::wait_if_aborting();
    signals::clean_up();
    progress::clear();
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("viaduct: {}", one_line(&error));
            ExitCode::from(FAILED)
        }
    }
}

/// Help goes to standard output; a wrong command line is one line on standard
/// error.
fn usage(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            drop(error.print());
            ExitCode::SUCCESS
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            eprintln!("viaduct: a command is missing; see viaduct --help");
            ExitCode::from(FAILED)
        }
        _ => {
            let text = error.to_string();
            let first = text.split("\n\n").next().unwrap_or_default();
            let first = first.trim_start_matches("error: ");
            let line = first.split_whitespace().collect::<Vec<_>>().join(" ");
            eprintln!("viaduct: {line}; see viaduct --help");
            ExitCode::from(FAILED)
        }
    }
}

/// An error and its causes in one line.
pub(crate) fn one_line(error: &anyhow::Error) -> String {
    format!("{error:#}")
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}

fn dispatch(cli: Cli) -> Result<u8> {
    match cli.command {
        Command::Run(args) => run::run(&args),
        Command::Up(args) => up(&args),
        Command::Exec(args) => exec(&args),
        Command::Console(args) => console(&args),
        Command::Down(args) => {
            progress::say("stopping the rack");
            client::down(&args.target.name, args.timeout).map(|()| 0)
        }
        Command::Status(args) => status(&args),
        Command::Nodes(args) => show(&args, show::nodes, |report| {
            serde_json::to_value(&report.nodes)
        }),
        Command::Vcpus(args) => show(&args, show::vcpus, |report| {
            serde_json::to_value(&report.vcpus)
        }),
        Command::Direct(command) => direct(command),
        Command::Memory(args) => show(&args, show::memory, |report| {
            serde_json::to_value(&report.nodes)
        }),
        Command::Resize(args) => change::resize(&args),
        Command::Rebalance(args) => change::rebalance(&args),
        Command::Node(command) => change::node(&command),
        Command::Vcpu(command) => change::vcpu(&command),
        Command::Job(command) => change::job(&command),
        Command::Policy(command) => change::policy(&command),
        Command::Events(args) => change::events(&args),
        Command::Top(args) => top::top(&args),
        Command::Explain(args) => change::explain(&args),
        Command::KvmUnitTests(args) => unit_tests::run(&args),
        Command::Selftest(args) => selftest::run(&args),
        Command::Completion(args) => completion(args.shell),
        Command::Supervise => supervise::supervise().map(|()| 0),
    }
}

fn up(args: &UpArgs) -> Result<u8> {
    supervise::check_free(&args.target.name)?;
    if machine::bare_image(&args.vm)?.is_some() {
        bail!("up needs a guest that takes commands; use viaduct run for this image");
    }
    let plan = Plan::make(&args.rack, &args.vm, &[])?;
    supervise::start(&args.target.name, plan).map(|()| 0)
}

fn direct(command: DirectCommand) -> Result<u8> {
    let (change, args) = match command {
        DirectCommand::Memory { amount, on, args } => {
            let change = match (amount.add, amount.remove) {
                (Some(Size(bytes)), _) => Direct::AddMemory { node: on, bytes },
                (None, size) => Direct::RemoveMemory {
                    node: on,
                    bytes: size.map_or(0, |size| size.0),
                },
            };
            (change, args)
        }
        DirectCommand::Slices {
            from,
            to,
            count,
            args,
        } => (Direct::Slices { from, to, count }, args),
    };
    progress::say("waiting for the guest");
    client::direct(&args.target.name, change, args.timeout).map(|()| 0)
}

fn exec(args: &ExecArgs) -> Result<u8> {
    let name = &args.target.name;
    let request = session::request(&args.command, args.tty)?;
    let connection = client::exec(name)?;
    let writer = connection
        .try_clone()
        .context("cannot use the connection")?;
    let agent = AgentClient::new(connection, writer);
    agent.wait_hello(std::time::Duration::from_secs(10))?;
    match session::run(&agent, &request)? {
        Outcome::Status(status) => Ok(status),
        Outcome::NotStarted(status, why) => {
            eprintln!("viaduct: {why}");
            Ok(status)
        }
        Outcome::Lost(error) => {
            // The rack knows better why.
            let reason = client::status(name)
                .ok()
                .and_then(|report| report.vm.reason);
            bail!(reason.unwrap_or_else(|| error.to_string()))
        }
    }
}

fn console(args: &ConsoleArgs) -> Result<u8> {
    let output = client::console(&args.target.name, !args.no_follow)?;
    let copy = || output.try_clone().context("cannot use the connection");
    if args.no_follow {
        attach::print(copy()?)?;
        return Ok(0);
    }
    let (input, handle) = (copy()?, copy()?);
    attach::attach(output, input, move || {
        drop(handle.shutdown(std::net::Shutdown::Both));
    })?;
    Ok(0)
}

fn status(args: &StatusArgs) -> Result<u8> {
    let verbose = args.verbose;
    let text = |report: &Report| {
        let mut text = show::status(report);
        if verbose {
            text += "\n";
            text += &show::vcpus(report);
        }
        text
    };
    show(&args.show, text, |report| serde_json::to_value(report))
}

fn show(
    args: &ShowArgs,
    text: impl Fn(&Report) -> String,
    json: impl Fn(&Report) -> serde_json::Result<serde_json::Value>,
) -> Result<u8> {
    let report = client::status(&args.target.name)?;
    let text = if args.json {
        let value = json(&report).context("cannot write JSON")?;
        format!("{value:#}\n")
    } else {
        text(&report)
    };
    stdio::print(&text).map(|()| 0)
}

fn completion(shell: clap_complete::Shell) -> Result<u8> {
    let mut script = Vec::new();
    // The generators would offer what help hides, too.
    let whole = Cli::command();
    let shown = whole
        .get_subcommands()
        .filter(|command| !command.is_hide_set());
    let mut shown = clap::Command::new("viaduct")
        .version(env!("CARGO_PKG_VERSION"))
        .subcommands(shown.cloned());
    clap_complete::generate(shell, &mut shown, "viaduct", &mut script);
    let script = String::from_utf8(script).context("the script is no text")?;
    stdio::print(&script).map(|()| 0)
}
