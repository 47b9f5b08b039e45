//! The replicated log measured: a hash map against the node-replication
//! crate, std's `RwLock` and dashmap, and what members that join, leave and
//! die cost the others.
//!
//! `log-bench [throughput] [join] [evict] [--keys N] [--millis N] [--repeat N]
//! [--only REPLICAS/THREADS/WRITES] [--mib N] [--json FILE]`; all three
//! without a name. `--keys` is a power of two; `--only 2/` measures all that
//! have two replicas.

mod map;
mod members;
mod region;
mod throughput;

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

fn main() -> ExitCode {
    let mut plan = throughput::Plan {
        keys: 1 << 14,
        time: Duration::from_millis(20),
        repeat: 25,
    };
    let (mut parts, mut only, mut mib, mut json) = (Vec::new(), String::new(), 1024, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        if matches!(name.as_str(), "throughput" | "join" | "evict") {
            parts.push(name);
            continue;
        }
        let value = arguments.next().unwrap_or_default();
        match (name.as_str(), value.parse::<u32>()) {
            ("--keys", Ok(keys)) if keys.is_power_of_two() => plan.keys = u64::from(keys),
            ("--millis", Ok(millis)) => plan.time = Duration::from_millis(u64::from(millis)),
            ("--repeat", Ok(repeat)) if repeat > 0 => plan.repeat = repeat as usize,
            ("--mib", Ok(size)) if size > 0 => mib = size as usize,
            ("--only", _) => only = value,
            ("--json", _) => json = Some(value),
            _ => {
                eprintln!("log-bench: {name} {value} is no option; see the head of main.rs");
                return ExitCode::from(2);
            }
        }
    }
    let wants = |part: &str| parts.is_empty() || parts.iter().any(|name| name == part);
    let mut fields = Vec::new();
    if wants("throughput") {
        fields.push(throughput_report(plan, &only));
    }
    if wants("join") {
        fields.push(join_report(mib));
    }
    if wants("evict") {
        fields.push(evict_report());
    }
    if let Some(path) = json
        && let Err(error) = std::fs::write(&path, format!("{{{}}}\n", fields.join(",")))
    {
        eprintln!("log-bench: {path}: {error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn throughput_report(plan: throughput::Plan, only: &str) -> String {
    println!(
        "hash map of {} keys, medians of {} rounds of {} ms; M operations/s (× how many viaduct does)",
        plan.keys,
        plan.repeat,
        plan.time.as_millis(),
    );
    println!("replicas threads writes   viaduct  node-replication         RwLock        dashmap");
    let mut rows = Vec::new();
    for throughput::Row { mix, rates } in throughput::run(plan, only) {
        let [viaduct, nr, lock, dash] = rates;
        print!(
            "{:8} {:7} {:5}% {:9.2} {:9.2}",
            mix.replicas, mix.threads, mix.writes, viaduct.millions, nr.millions
        );
        println!(
            " (×{:5.2}) {:6.2} (×{:5.2}) {:6.2} (×{:5.2})",
            nr.ratio, lock.millions, lock.ratio, dash.millions, dash.ratio
        );
        let mut row = format!(
            "{{\"replicas\":{},\"threads\":{},\"writes\":{},\"viaduct\":{:.3}",
            mix.replicas, mix.threads, mix.writes, viaduct.millions
        );
        for (name, rate) in [
            ("node_replication", nr),
            ("rwlock", lock),
            ("dashmap", dash),
        ] {
            let _ = write!(
                row,
                ",\"{name}\":{{\"m_per_s\":{:.3},\"ratio\":{:.3}}}",
                rate.millions, rate.ratio
            );
        }
        row.push('}');
        rows.push(row);
    }
    format!("\"throughput\":[{}]", rows.join(","))
}

fn join_report(mib: usize) -> String {
    let join = members::join(mib);
    let line = |what: &str, latency: members::Latency| {
        println!(
            "{what}: median {:.1} µs, 99 % {:.1}, 99.9 % {:.1}, most {:.1}",
            latency.p50, latency.p99, latency.p999, latency.most
        );
    };
    println!(
        "join of a replica of {} MiB beside a writer: {:.2} s",
        join.state_mib, join.seconds
    );
    line("  a write before   ", join.quiet);
    line("  a write meanwhile", join.joining);
    println!("  memory back on leave: {:.1} %", join.back_percent);
    format!(
        "\"join\":{{\"mib\":{},\"seconds\":{:.3},\"p99_us_before\":{:.2},\"p99_us\":{:.2},\"p999_us\":{:.2},\"max_us\":{:.2},\"memory_back_percent\":{:.2}}}",
        join.state_mib,
        join.seconds,
        join.quiet.p99,
        join.joining.p99,
        join.joining.p999,
        join.joining.most,
        join.back_percent
    )
}

fn evict_report() -> String {
    let eviction = members::evict();
    println!(
        "eviction of a member that stops, lease {:.0} ms: after {:.1} ms; longest write {:.1} ms",
        eviction.lease_ms, eviction.evicted_ms, eviction.longest_write_ms
    );
    format!(
        "\"eviction\":{{\"lease_ms\":{:.0},\"evicted_ms\":{:.2},\"longest_write_ms\":{:.2}}}",
        eviction.lease_ms, eviction.evicted_ms, eviction.longest_write_ms
    )
}
