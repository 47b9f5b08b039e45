//! The screen at several sizes.

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use serde_json::json;

use super::*;

const GIB: u64 = 1 << 30;

/// A rack of eight nodes and one that decides; so many vCPUs and slices, by
/// turns on each.
fn report(vcpus: u16, slices: u64) -> Report {
    let node = |id: u16| {
        let is_control = id == 8;
        json!({
            "id": id, "state": "ready", "role": if is_control { "control" } else { "data" },
            "cores": 8, "vcpus": if is_control { 0 } else { 8 }, "memory_bytes": GIB,
            "memory_home_bytes": GIB, "memory_offset_bytes": 0, "memory_away_bytes": 0,
            "memory_added_bytes": 0, "memory_added_seen_bytes": 0, "memory_free_bytes": 0,
            "memory_room_bytes": GIB, "memory_taken_bytes": 0, "memory_copying_us": 0,
            "memory_longest_us": 0, "pid": 1, "counters": {"memory_mapped_bytes": GIB},
            "ipis_to": [1, 2, 3, 4, 5, 6, 7, 8, 9],
        })
    };
    let vcpu = |id: u16| {
        json!({
            "id": id, "node": id % 8, "core": 0, "state": "started", "moves": 0,
            "blackout_us": 0, "counters": {"exits": 5},
        })
    };
    let size = json!({"vcpus": vcpus, "memory_bytes": 8 * GIB});
    let job = |id: u32| {
        json!({
            "id": id, "wish": format!("drain node {id}"), "state": "running", "ended": false,
            "fulfilled": false, "steps": 9, "done": 3, "waits_for": "the guest to take 128M",
        })
    };
    let run = |at: u64| json!({"bytes": 8 * GIB / slices, "home": 0, "node": at % 8});
    let report = json!({
        "name": "large", "accelerator": "tcg", "pid": 1, "uptime_seconds": 1.0,
        "vm": {
            "state": "running", "vcpus": vcpus, "vcpus_granted": vcpus, "vcpus_seen": vcpus,
            "vcpus_max": 64, "memory_bytes": 8 * GIB, "metadata_bytes": 0,
            "memory_granted_bytes": 8 * GIB, "memory_seen_bytes": 8 * GIB,
            "memory_max_bytes": 8 * GIB,
        },
        "cluster": {
            "controller": 8, "term": 1, "position": 9, "digest": "0",
            "vm": {
                "phase": "running", "desired": size, "granted": size, "seen": size,
                "least": size, "most": size, "homes": [], "seats": [],
            },
            "nodes": [], "left": [], "jobs": [job(1), job(2)],
        },
        "nodes": (0..9).map(node).collect::<Vec<_>>(),
        "memory": (0..slices).map(run).collect::<Vec<_>>(),
        "vcpus": (0..vcpus).map(vcpu).collect::<Vec<_>>(),
    });
    serde_json::from_value(report).expect("a report")
}

fn screen(view: &View, width: u16, height: u16) -> Vec<String> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a screen");
    terminal.draw(|frame| view.draw(frame)).expect("drawn");
    let buffer = terminal.backend().buffer();
    let lines = buffer.content.chunks(usize::from(width.max(1)));
    let text = lines.map(|line| line.iter().map(ratatui::buffer::Cell::symbol).collect());
    text.map(|line: String| line.trim_end().to_owned())
        .collect()
}

fn has(screen: &[String], start: &str) -> bool {
    screen.iter().any(|line| line.starts_with(start))
}

#[test]
fn nine_nodes_fit_a_plain_terminal() {
    let view = View::new(report(64, 1024));
    let shown = screen(&view, 80, 24);
    assert!(shown[0].starts_with("large  tcg  9 nodes  vm running  node 8 rules"));
    assert!(shown[0].ends_with("q quits"), "{shown:#?}");
    assert_eq!(
        shown[1],
        "desired 64 vCPUs 8G  granted 64 vCPUs 8G  seen 64 vCPUs 8G"
    );
    for node in 0..8 {
        assert!(has(&shown, &format!("{node}     data")), "{shown:#?}");
        assert!(has(&shown, &format!("from {node}")), "{shown:#?}");
    }
    assert!(has(&shown, "8     control"), "{shown:#?}");
    let vcpus = format!("VCPUS  {}", "01234567".repeat(8));
    assert!(shown.contains(&vcpus), "{shown:#?}");
    let job = "JOBS   2    running       3/9     drain node 2  waits for the guest";
    assert!(has(&shown, job), "{shown:#?}");
    let slices = shown.iter().find(|line| line.starts_with("SLICES"));
    assert_eq!(slices.expect("a map").len(), 80);
}

#[test]
fn what_matters_most_is_shown_on_small_screens() {
    let view = View::new(report(64, 1024));
    let shown = screen(&view, 80, 13);
    for part in ["8     control", "JOBS   2"] {
        assert!(has(&shown, part), "{part} in {shown:#?}");
    }
    assert!(!has(&shown, "from 0") && !has(&shown, "SLICES"));
    let shown = screen(&view, 40, 6);
    assert!(shown[0].starts_with("large") && has(&shown, "2     data"));
    for (width, height) in [(0, 0), (1, 1), (3, 2), (7, 30), (300, 1), (1, 100)] {
        let _ = screen(&view, width, height);
    }
}

#[test]
fn large_screens_show_more_of_it() {
    let view = View::new(report(4, 1024));
    let shown = screen(&view, 120, 60);
    assert!(has(&shown, "VCPUS  0:0 1:1 2:2 3:3"), "{shown:#?}");
    let first = shown.iter().position(|line| line.starts_with("SLICES"));
    let map = &shown[first.expect("a map")..][..4];
    assert!(map.iter().all(|line| line.len() == 120), "{shown:#?}");
    assert!(has(&shown, "       1    running"), "{shown:#?}");
}

#[test]
fn each_part_of_the_map_is_of_the_node_that_gives_most_of_it() {
    let run = |bytes, node| RunReport {
        bytes,
        home: 0,
        node,
    };
    let map = |runs: &[RunReport], cells| cells_by_node(runs, cells);
    assert_eq!(map(&[run(4, 0), run(4, 1)], 4), [0, 0, 1, 1]);
    assert_eq!(map(&[run(3, 0), run(1, 1), run(1, 2)], 1), [0]);
    assert_eq!(map(&[run(1, 3), run(9, 4)], 5), [4, 4, 4, 4, 4]);
    assert_eq!(map(&[run(10, 3), run(10, 4)], 5), [3, 3, 4, 4, 4]);
    assert_eq!(map(&[], 3), Vec::<u16>::new());
    assert_eq!(map(&[run(0, 1)], 2), Vec::<u16>::new());
    assert_eq!(map(&[run(u64::MAX, 1), run(u64::MAX, 2)], 2), [1, 2]);
}

#[test]
fn rates_are_of_a_second() {
    let mut view = View::new(report(8, 8));
    let mut next = report(8, 8);
    next.uptime_seconds += 0.5;
    next.vcpus[3].counters[0].1 += 100;
    next.nodes[1].ipis_to[2] += 7;
    view.update(next);
    let json = view.json().expect("JSON");
    assert_eq!(
        json["exits_per_second"],
        json!([0, 0, 0, 200, 0, 0, 0, 0, 0])
    );
    assert_eq!(json["ipis_per_second"][1][2], 14);
    assert_eq!(json["status"]["nodes"][1]["ipis_to"][2], 10);
}
