//! The reference: CP-SAT, in a Python process that is fed problems.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result};
use control_plane::optimise::{Hinge, Limit, Problem, Side};
use serde::Deserialize;
use serde_json::{Value, json};

/// What CP-SAT says of a problem.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Answer {
    /// OPTIMAL, FEASIBLE, …
    pub(crate) status: String,
    pub(crate) cost: i64,
    pub(crate) bound: i64,
    /// Of all its threads.
    pub(crate) cpu_seconds: f64,
}

pub(crate) struct CpSat {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl CpSat {
    /// Starts it; `python` is an interpreter that has the package `ortools`.
    pub(crate) fn start(python: &Path, workers: u32, seconds: f64) -> Result<Self> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("cp_sat.py");
        let mut process = Command::new(python)
            .arg(script)
            .args([workers.to_string(), seconds.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", python.display()))?;
        let input = process.stdin.take().context("no pipe")?;
        let output = BufReader::new(process.stdout.take().context("no pipe")?);
        Ok(Self {
            process,
            input,
            output,
        })
    }

    pub(crate) fn solve(&mut self, problem: &Problem) -> Result<Answer> {
        writeln!(self.input, "{}", to_json(problem))?;
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        serde_json::from_str(&line).context("CP-SAT gave no answer: is ortools installed?")
    }
}

impl Drop for CpSat {
    fn drop(&mut self) {
        // Nothing is lost by it.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn hinges(hinges: &[Hinge]) -> Value {
    let one = |hinge: &Hinge| {
        let side = match hinge.side {
            Side::Above => "above",
            Side::Below => "below",
        };
        json!([hinge.at, hinge.weight, side])
    };
    hinges.iter().map(one).collect()
}

fn limit(limit: &Limit) -> Value {
    json!({ "max": limit.max, "soft_max": limit.soft_max, "weight": limit.weight })
}

fn to_json(problem: &Problem) -> Value {
    let nodes: Vec<Value> = problem
        .nodes
        .iter()
        .map(|node| {
            json!({
                "vcpus": [node.vcpus.min, node.vcpus.max],
                "slices": [node.slices.min, node.slices.max],
                "open": node.open_weight,
                "vcpu_hinges": hinges(&node.vcpu_hinges),
                "slice_hinges": hinges(&node.slice_hinges),
                "domain": node.domain,
            })
        })
        .collect();
    let domains: Vec<Value> = problem
        .domains
        .iter()
        .map(|domain| json!({ "vcpus": limit(&domain.vcpus), "slices": limit(&domain.slices) }))
        .collect();
    json!({
        "vcpus": problem.total.vcpus,
        "slices": problem.total.slices,
        "ratio": problem.ratio,
        "far_weight": problem.far_weight,
        "nodes": nodes,
        "domains": domains,
    })
}
