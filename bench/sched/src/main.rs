//! Measures the optimiser: against CP-SAT on racks that both can solve, and by
//! itself on a thousand nodes.

mod figures;
mod instance;
mod reference;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Parser;
use control_plane::optimise::{Budget, NoSolution, Problem, Share, Solution, solve, solve_few};
use rustix::time::{ClockId, clock_gettime};
use vmm_shared::log::Clock;

use figures::{Comparison, Large};
use instance::{Kind, instance};
use reference::CpSat;

/// Percent of a rack that is in use.
const USES: [u32; 3] = [10, 50, 90];
/// The time that the optimiser has for any problem.
const BUDGET: Budget = Budget::exact(100_000_000);

/// Measures the optimiser against OR-tools CP-SAT, and on large clusters.
#[derive(Debug, Parser)]
#[command(name = "sched-bench", max_term_width = 100)]
struct Cli {
    /// Random racks for each use of 10, 50 and 90 %
    #[arg(long, value_name = "N", default_value_t = 80)]
    instances: u64,
    /// The first seed
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// A Python interpreter with the package `ortools`; without it nothing is compared
    #[arg(long, value_name = "FILE")]
    python: Option<PathBuf>,
    /// Threads of CP-SAT
    #[arg(long, value_name = "N", default_value_t = 2)]
    workers: u32,
    /// The time that CP-SAT has for a problem
    #[arg(long, value_name = "SECONDS", default_value_t = 20.0)]
    seconds: f64,
    /// Print each instance, too
    #[arg(short, long)]
    verbose: bool,
}

/// Time in which this thread had a processor: other work on the machine changes
/// little of the figures.
struct Processor;

impl Clock for Processor {
    fn now_ns(&self) -> u64 {
        let now = clock_gettime(ClockId::ThreadCPUTime);
        let part = |part: i64| u64::try_from(part).expect("time since the thread's start");
        part(now.tv_sec) * 1_000_000_000 + part(now.tv_nsec)
    }
}

fn main() -> ExitCode {
    match bench(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sched-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

type Solver = fn(&Problem, Budget, &Processor) -> Result<Solution, NoSolution>;

/// The answer, and the seconds that it took.
fn timed(solver: Solver, problem: &Problem, budget: Budget) -> Result<(Solution, f64)> {
    let start = Processor.now_ns();
    let answer = solver(problem, budget, &Processor);
    let seconds = Duration::from_nanos(Processor.now_ns() - start).as_secs_f64();
    let solution = answer.map_err(|error| anyhow::anyhow!("no placement: {error:?}"))?;
    ensure!(problem.allows(&solution.shares), "not a placement");
    ensure!(
        problem.cost(&solution.shares) == solution.cost,
        "a wrong cost"
    );
    Ok((solution, seconds))
}

fn bench(cli: &Cli) -> Result<()> {
    if let Some(python) = &cli.python {
        let mut reference = CpSat::start(python, cli.workers, cli.seconds)?;
        compare(cli, &mut reference)?;
    }
    large()
}

fn compare(cli: &Cli, reference: &mut CpSat) -> Result<()> {
    let mut comparison = Comparison::default();
    for seed in cli.seed..cli.seed + cli.instances {
        for used in USES {
            let nodes = [4, 8, 16, 32][usize::try_from(seed % 4)?];
            let kind = Kind {
                nodes,
                used,
                slices: &[128, 256, 512, 1024],
                total: None,
            };
            let problem = instance(seed * 3 + u64::from(used), kind);
            let (ours, seconds) = timed(solve, &problem, BUDGET)?;
            let theirs = reference.solve(&problem)?;
            if cli.verbose {
                println!(
                    "seed {seed} used {used} % nodes {nodes}: {} ({}, {} branches) in {:.3} ms; \
                     CP-SAT {} ({}) in {:.3} ms, {}",
                    ours.cost,
                    ours.bound,
                    ours.branches,
                    seconds * 1e3,
                    theirs.cost,
                    theirs.bound,
                    theirs.cpu_seconds * 1e3,
                    theirs.status
                );
            }
            let least = theirs.cpu_seconds / f64::from(cli.workers);
            comparison.add(nodes, used, (&ours, seconds), (&theirs, least));
        }
    }
    print!("{comparison}");
    Ok(())
}

fn large() -> Result<()> {
    for used in USES {
        let (mut placed, mut quick, mut grown) =
            (Large::default(), Large::default(), Large::default());
        for seed in 0..20 {
            let kind = Kind {
                nodes: 1000,
                used,
                slices: &[128, 256, 512],
                total: Some(Share::new(2000, 20_000)),
            };
            let mut problem = instance(seed, kind);
            let good = Budget {
                gap_permille: 20,
                ..BUDGET
            };
            let (solution, seconds) = timed(solve, &problem, good)?;
            quick.add(&solution, seconds);
            let (solution, seconds) = timed(solve, &problem, BUDGET)?;
            placed.add(&solution, seconds);
            for (node, share) in problem.nodes.iter_mut().zip(&solution.shares) {
                (node.vcpus.min, node.slices.min) = (share.vcpus, share.slices);
            }
            problem.total.vcpus += 1;
            problem.total.slices += 10;
            if problem.is_possible() {
                let (solution, seconds) = timed(solve_few, &problem, Budget::exact(500_000))?;
                grown.add(&solution, seconds);
            }
        }
        println!("1000 nodes, {used} % used, 2,000 vCPUs and 20,000 slices:");
        println!("  placed, until the gap is 2 % : {quick}");
        println!("  placed, 100 ms               : {placed}");
        println!("  1 vCPU and 10 slices more    : {grown}");
    }
    Ok(())
}
