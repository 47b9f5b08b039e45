//! What `--json` prints against what docs/console.md says of it.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::Value;
use vmm_shared::coherence::Counters;
use vmm_shared::control::{Counter, NodeCounter};

use crate::change::ChangedReport;
use crate::protocol::{NodeReport, ReplicaReport, Report, RunReport, VcpuReport, VmReport};
use crate::tables::{
    Amount, Changed, ClusterReport, Event, JobReport, NodeRow, PlanReport, RefusedBlock, Shape,
};
use crate::top;

const MANUAL: &str = include_str!("../../docs/console.md");

type Fields = BTreeSet<String>;

/// The fields that the manual lists under each heading of its part on JSON.
fn documented() -> BTreeMap<String, Fields> {
    let (_, json) = MANUAL.split_once("\n## JSON\n").expect("it is there");
    let (json, _) = json.split_once("\n## ").expect("it is not the last");
    let sections = json.split("\n### ").skip(1);
    let section = |text: &str| {
        let (name, rest) = text.split_once('\n').expect("something follows");
        let rows = rest.lines().filter(|line| line.starts_with("| `"));
        let first = rows.filter_map(|row| row.split('|').nth(1));
        // What stands between each second pair of quotes.
        let fields = first.flat_map(|cell| cell.split('`').skip(1).step_by(2));
        (name.to_owned(), fields.map(str::to_owned).collect())
    };
    sections.map(section).collect()
}

fn fields(value: &impl Serialize) -> Fields {
    match serde_json::to_value(value).expect("JSON") {
        Value::Object(fields) => fields.into_iter().map(|(name, _)| name).collect(),
        other => panic!("no object: {other}"),
    }
}

const AMOUNT: Amount = Amount {
    vcpus: 1,
    memory_bytes: 1,
};

fn job() -> JobReport {
    JobReport {
        id: 1,
        wish: String::new(),
        state: "stuck".to_owned(),
        ended: true,
        fulfilled: false,
        steps: 1,
        done: 1,
        reason: Some(String::new()),
        waits_for: Some(String::new()),
        kept_vcpus: vec![1],
        short_bytes: 1,
        refused_blocks: vec![refused_block()],
    }
}

fn refused_block() -> RefusedBlock {
    RefusedBlock {
        block: 0,
        guest_name: "memory32".to_owned(),
        home: 0,
        reason: String::new(),
    }
}

fn shape() -> Shape {
    Shape {
        phase: "running".to_owned(),
        desired: AMOUNT,
        granted: AMOUNT,
        seen: AMOUNT,
        least: AMOUNT,
        most: AMOUNT,
        homes: vec![None],
        seats: vec![0],
    }
}

fn row() -> NodeRow {
    NodeRow {
        id: 0,
        cordoned: false,
        failure_domain: 0,
        has: AMOUNT,
        free: AMOUNT,
        gives: AMOUNT,
    }
}

fn cluster() -> ClusterReport {
    ClusterReport {
        controller: None,
        term: 0,
        position: 0,
        digest: String::new(),
        vm: Some(shape()),
        nodes: vec![row()],
        left: Vec::new(),
        jobs: vec![job()],
    }
}

fn plan() -> PlanReport {
    PlanReport {
        conflict: Some(String::new()),
        ..PlanReport::default()
    }
}

fn replica() -> ReplicaReport {
    ReplicaReport {
        position: 0,
        digest: String::new(),
    }
}

fn node() -> NodeReport {
    NodeReport {
        id: 0,
        state: "ready".to_owned(),
        role: "data".to_owned(),
        cores: 1,
        vcpus: 1,
        replica: Some(replica()),
        memory_bytes: 1,
        memory_home_bytes: 1,
        memory_offset_bytes: 0,
        memory_away_bytes: 0,
        memory_added_bytes: 0,
        memory_added_seen_bytes: 0,
        memory_free_bytes: 0,
        memory_room_bytes: 1,
        memory_taken_bytes: 0,
        memory_copying_us: 0,
        memory_longest_us: 0,
        pid: 1,
        counters: Vec::new(),
        ipis_to: vec![0],
    }
}

fn vcpu() -> VcpuReport {
    VcpuReport {
        id: 0,
        node: 0,
        core: 0,
        state: "started".to_owned(),
        moves: 0,
        blackout_us: 0,
        counters: vec![("exits".to_owned(), 1), ("exit_io".to_owned(), 0)],
    }
}

fn vm() -> VmReport {
    VmReport {
        state: "failed".to_owned(),
        vcpus: 1,
        vcpus_granted: 1,
        vcpus_seen: 1,
        vcpus_max: 1,
        memory_bytes: 1,
        metadata_bytes: 1,
        memory_granted_bytes: 1,
        memory_seen_bytes: 1,
        memory_max_bytes: 1,
        reason: Some(String::new()),
    }
}

const RUN: RunReport = RunReport {
    bytes: 1,
    home: 0,
    node: 0,
};

fn report() -> Report {
    Report {
        name: "default".to_owned(),
        accelerator: "tcg".to_owned(),
        pid: 1,
        uptime_seconds: 1.0,
        vm: vm(),
        cluster: Some(cluster()),
        nodes: vec![node()],
        memory: vec![RUN],
        vcpus: vec![vcpu()],
    }
}

fn printed() -> BTreeMap<String, Fields> {
    let change = Changed {
        verdict: "applied".to_owned(),
        code: 0,
        job: Some(1),
        reason: Some(String::new()),
        plan: Some(plan()),
    };
    let change = ChangedReport {
        changed: &change,
        ended: None,
    };
    let event = Event {
        position: 0,
        text: String::new(),
        job: Some(1),
        refusal: Some(1),
    };
    let top = top::json(report()).expect("JSON");
    let names = |names: &mut dyn Iterator<Item = &'static str>| names.map(str::to_owned).collect();
    let of_node = NodeCounter::ALL.into_iter().map(|(_, name)| name);
    let of_node = of_node.chain(Counters::default().values().map(|(name, _)| name));
    let of_vcpu = Counter::ALL.into_iter().map(|(_, name)| name);
    [
        ("status", fields(&report())),
        ("vm", fields(&vm())),
        ("node", fields(&node())),
        ("counters of a node", names(&mut { of_node })),
        ("vcpu", fields(&vcpu())),
        ("counters of a vcpu", names(&mut { of_vcpu })),
        ("run", fields(&RUN)),
        ("cluster", fields(&cluster())),
        ("replica", fields(&replica())),
        ("shape", fields(&shape())),
        ("amount", fields(&AMOUNT)),
        ("row", fields(&row())),
        ("job", fields(&job())),
        ("refused block", fields(&refused_block())),
        ("change", fields(&change)),
        ("plan", fields(&plan())),
        ("event", fields(&event)),
        ("top", fields(&top)),
    ]
    .map(|(name, fields)| (name.to_owned(), fields))
    .into()
}

#[test]
fn the_manual_lists_what_is_printed() {
    let (documented, printed) = (documented(), printed());
    for (name, fields) in &printed {
        assert_eq!(documented.get(name), Some(fields), "of {name}");
    }
    assert!(documented.keys().eq(printed.keys()), "{documented:?}");
}

#[test]
fn counters_are_objects_and_keep_their_order_on_the_way() {
    let text = serde_json::to_string(&vcpu()).expect("JSON");
    assert!(
        text.contains(r#""counters":{"exits":1,"exit_io":0}"#),
        "{text}"
    );
    let back: VcpuReport = serde_json::from_str(&text).expect("a vCPU");
    assert_eq!(back.counters, vcpu().counters);
    let garbage = text.replace("{\"exits\":1", "[{\"exits\":1");
    assert!(serde_json::from_str::<VcpuReport>(&garbage).is_err());
}
