//! A stock Linux boots, whatever the VM's shape, and finds a sane machine.

use viaduct_tests::{Bench, alarms};

/// A VM and what Linux must make of it.
struct Shape {
    root: &'static str,
    cores: u32,
    vcpus: u32,
    memory: &'static str,
    mib: u64,
}

/// What the kernel may keep for itself: its image, page descriptors (1/64 of
/// the memory), the crash kernel's and firmware's share.
fn least_visible_mib(mib: u64) -> u64 {
    mib - mib / 32 - 80
}

/// Says what the kernel found, one `key=value` a line, and then its log.
const SURVEY: &str = r#"
cd /sys/devices/system
echo "online=$(cat cpu/online)"
echo "processors=$(grep -c '^processor' /proc/cpuinfo)"
echo "x2apic=$(grep -c '^flags.* x2apic' /proc/cpuinfo)"
echo "clocksource=$(cat clocksource/clocksource0/current_clocksource)"
echo "nodes=$(ls -d node/node* | wc -l)"
echo "node_cpus=$(cat node/node0/cpulist)"
echo "memory_kib=$(awk '/^MemTotal/ { print $2 }' /proc/meminfo)"
echo "node_memory_kib=$(awk '/MemTotal/ { print $4 }' node/node0/meminfo)"
echo "high_ram=$(grep -c '^ *1[0-9a-f]*-.* : System RAM' /proc/iomem)"
echo "taint=$(cat /proc/sys/kernel/tainted)"
echo "root=$(awk '$2 == "/" { print $3 }' /proc/mounts | tail -n 1)"
for each in /proc/[0-9]*; do
    awk '/^State:.*D/ { print "stuck=" FILENAME }' "$each/status" 2>/dev/null
done
echo log:
dmesg
"#;

fn check(shape: &Shape) {
    let bench = Bench::new();
    let (cores, vcpus) = (shape.cores.to_string(), shape.vcpus.to_string());
    let done = bench
        .line(["run", "--rootfs", shape.root, "--memory", shape.memory])
        .words(["--cores", &cores, "--vcpus", &vcpus])
        .guest(["sh", "-c", SURVEY])
        .finish()
        .well();
    let said = done.out();
    let (survey, log) = said.split_once("log:\n").expect("both parts");
    let value = |key: &str| {
        let prefix = format!("{key}=");
        let line = survey.lines().find_map(|line| line.strip_prefix(&prefix));
        line.unwrap_or_else(|| panic!("no {key} in {survey}"))
    };
    let number = |key: &str| value(key).parse::<u64>().expect("a number");

    let list = match shape.vcpus {
        1 => "0".to_owned(),
        count => format!("0-{}", count - 1),
    };
    assert_eq!(value("online"), list);
    assert_eq!(number("processors"), u64::from(shape.vcpus));
    assert_eq!(number("x2apic"), u64::from(shape.vcpus));
    assert_eq!((number("nodes"), value("node_cpus")), (1, list.as_str()));

    let visible = number("memory_kib");
    assert!(visible <= shape.mib << 10, "{visible} KiB");
    let least = least_visible_mib(shape.mib) << 10;
    assert!(visible >= least, "{visible} KiB, of {least} at least");
    assert_eq!(number("node_memory_kib"), visible);
    // From 3 GiB on, memory goes on above 4 GiB.
    assert_eq!(number("high_ram"), u64::from(shape.mib > 3 << 10));

    assert!(["tsc", "kvm-clock"].contains(&value("clocksource")));
    for words in [
        "Hypervisor detected: KVM",
        "kvm-clock: Using msrs",
        "clocksource: Switched to clocksource kvm-clock",
        "x2apic: enabled by BIOS, switching to x2apic ops",
        "TSC deadline timer available",
    ] {
        assert!(log.contains(words), "no {words:?} in:\n{log}");
    }
    assert_eq!(alarms(log), Vec::<&str>::new());
    assert_eq!(value("taint"), "0");
    assert!(!survey.contains("stuck="), "{survey}");
    bench.assert_nothing_left();
}

#[test]
fn one_vcpu_and_little_memory() {
    check(&Shape {
        root: "busybox",
        cores: 1,
        vcpus: 1,
        memory: "256M",
        mib: 256,
    });
}

#[test]
fn one_vcpu_on_a_node_with_two_cores() {
    check(&Shape {
        root: "debian",
        cores: 2,
        vcpus: 1,
        memory: "512M",
        mib: 512,
    });
}

#[test]
fn two_vcpus() {
    check(&Shape {
        root: "debian",
        cores: 2,
        vcpus: 2,
        memory: "1G",
        mib: 1 << 10,
    });
}

#[test]
fn four_vcpus() {
    check(&Shape {
        root: "debian",
        cores: 4,
        vcpus: 4,
        memory: "1G",
        mib: 1 << 10,
    });
}

#[test]
fn memory_on_both_sides_of_the_hole() {
    check(&Shape {
        root: "busybox",
        cores: 2,
        vcpus: 2,
        memory: "4G",
        mib: 4 << 10,
    });
}

#[test]
fn memory_of_an_odd_number_of_large_pages() {
    check(&Shape {
        root: "busybox",
        cores: 1,
        vcpus: 1,
        memory: "3074M",
        mib: 3074,
    });
}

#[test]
fn twenty_boots_in_a_row() {
    let bench = Bench::new();
    for boot in 0..20 {
        let done = bench.run(&["sh", "-c", "nproc; exit 20"]);
        assert_eq!((done.status, done.err().as_str()), (20, ""), "boot {boot}");
        assert_eq!(done.out(), "2\n", "boot {boot}");
        bench.assert_nothing_left();
    }
}

#[test]
fn two_nodes_give_one_guest() {
    const SURVEY: &str = "nproc; ls -d /sys/devices/system/node/node?; \
                          cat /sys/devices/system/node/node?/meminfo | grep MemTotal";
    let bench = Bench::new();
    let finished = bench
        .line(["run", "--nodes", "2", "--cores", "1", "--vcpus", "2"])
        .words(["--memory", "1G", "--rootfs", "debian"])
        .guest(["sh", "-c", SURVEY])
        .finish()
        .well();
    let said = finished.out();
    let (nodes, memory) = said.split_at(said.find("Node 0").expect("its memory"));
    let folder = "/sys/devices/system/node/node";
    assert_eq!(nodes, format!("2\n{folder}0\n{folder}1\n"));
    let mut total = 0;
    for (line, node) in memory.lines().zip(["0", "1"]) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["Node", number, "MemTotal:", kib, "kB"] = words[..] else {
            panic!("{line}")
        };
        assert_eq!(number, node);
        let kib: u64 = kib.parse().expect("a number");
        // The kernel lies on the first.
        assert!((400 << 10..=512 << 10).contains(&kib), "{line}");
        total += kib;
    }
    assert_eq!(memory.lines().count(), 2, "{memory}");
    assert!(total >= least_visible_mib(1 << 10) << 10, "{memory}");
    bench.assert_nothing_left();
}
