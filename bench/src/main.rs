//! Measures one guest on several systems: on Viaduct, on plain QEMU without a
//! hypervisor and under KVM as the nested hypervisor, or on one node and on two.
//!
//! Kernel, initial RAM file system, command line, vCPUs and memory are the
//! same. The systems take turns, so that a drift of the machine's speed
//! falls on all of them.

mod child;
mod console;
mod images;
mod metric;
mod outer;
mod qemu;
mod quiet;
mod report;
mod session;
mod suite;
mod system;
mod tsc;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use rack::Size;

use images::BenchImages;
use report::Report;
use suite::Suite;
use system::{Guest, System};

/// Measures a stock Linux guest on Viaduct and on what it is compared with.
#[derive(Debug, Parser)]
#[command(name = "bench", max_term_width = 100)]
struct Cli {
    /// What is compared
    #[arg(value_enum, value_name = "SUITE", default_value = "hypervisors")]
    suite: Suite,
    /// For vmexit: the folder of a built tree of kvm-unit-tests
    #[arg(long, value_name = "DIR", required_if_eq("suite", "vmexit"))]
    tree: Option<PathBuf>,
    /// Runs on each system; the figures are medians
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// One run on each system
    #[arg(long, conflicts_with = "runs")]
    quick: bool,
    /// Leave out systems that are not named
    #[arg(long, value_enum, value_name = "SYSTEM")]
    only: Vec<System>,
    /// Virtual CPUs of the guest; the two-CPU measurements need two
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(2..=8))]
    vcpus: u32,
    /// Memory of the guest
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    memory: Size,
    /// Also write the figures as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Show the guests' consoles
    #[arg(short, long)]
    verbose: bool,
}

fn main() -> ExitCode {
    match bench(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(cli: &Cli) -> Result<()> {
    let runs = if cli.quick { 1 } else { cli.runs };
    let of_suite = cli.suite.systems().iter().copied();
    let systems: Vec<System> = of_suite
        .filter(|system| cli.only.is_empty() || cli.only.contains(system))
        .collect();
    ensure!(
        cli.memory.0.is_multiple_of(2 << 20),
        "--memory must be a multiple of 2M"
    );
    ensure!(
        !matches!(cli.suite, Suite::Span | Suite::Pv) || cli.vcpus.is_multiple_of(2),
        "--vcpus must be even: each of two nodes gets half"
    );
    let guest = Guest {
        vcpus: cli.vcpus,
        memory: cli.memory,
        verbose: cli.verbose,
    };
    let mut report = Report::new(cli.suite, runs, &guest)?;
    let bare = match (&cli.tree, cli.suite) {
        (Some(tree), Suite::Vmexit) => Some(tree.join("x86/vmexit.flat")),
        _ => None,
    };
    let with_kvm = systems.contains(&System::Kvm);
    let images = BenchImages::build(cli.suite, &guest, bare, with_kvm)?;
    for run in 1..=runs {
        for system in &systems {
            eprintln!("bench: run {run} of {runs}: {}", system.title());
            report.add_idle(quiet::idle_share());
            match system.run(&guest, &images) {
                Ok(outcome) => report.add(*system, outcome),
                // Hours of other figures may be there already.
                Err(error) => {
                    eprintln!("bench: no figures from this run: {error:#}");
                    report.add_failure(*system);
                }
            }
        }
    }
    if let Some(path) = &cli.json {
        let text = serde_json::to_string_pretty(&report.to_json())?;
        std::fs::write(path, text + "\n")
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    print!("{}", report.text());
    let failures = report.failures();
    ensure!(
        failures == 0,
        "{failures} run(s) gave no figures: see above"
    );
    Ok(())
}
