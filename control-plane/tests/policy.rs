//! Policies: what an operator may write, and what is said to one who may not.

use control_plane::cluster::{Change, Cluster, Op, Refusal};
use control_plane::policy::text::parse;
use control_plane::policy::{Fault, Kind, Policy};
use proptest::prelude::*;
use vmm_shared::log::{At, MemberId, StateMachine};

const FINE: &str = r#"
# What an operator might write.
[[constraint]]
name = "room-for-the-host"
kind = "headroom"
cores = 1
slices = 64
hard = true

[[constraint]]
name = "few-nodes"
kind = "pack"
weight = 40

[[constraint]]
name = "survive-a-rack"
kind = "failure-domain"
percent = 60
weight = 5
slice-weight = 1

[[constraint]]
name = "memory near its vCPUs"
kind = "near-memory"
weight = 3

[[constraint]]
name = "stay"
kind = "fewest-moves"
weight = 8
slice-weight = 2

[[constraint]]
name = "console-vcpu"
kind = "pin"
hard = true
vm = 0
vcpu = 0
node = 1
"#;

fn at() -> At {
    At {
        position: 1,
        member: MemberId::new(0).expect("a small number"),
    }
}

#[test]
fn a_policy_survives_its_binary_form() {
    let policy = parse(FINE).expect("a policy");
    assert_eq!(policy.rules().len(), 6);
    assert_eq!(policy.rules()[2].slice_weight, 1);
    assert_eq!(policy.rules()[3].kind, Kind::Near);
    assert_eq!(policy.rules()[3].name.to_string(), "memory near its vCPUs");
    assert_eq!(Policy::from_bytes(policy.as_bytes()), Ok(policy));
}

#[test]
fn a_faulty_policy_is_named_by_line_and_reason() {
    let table = |body: &str| format!("[[constraint]]\nname = \"a\"\n{body}\n");
    let second = |body: &str| format!("{FINE}\n[[constraint]]\nname = \"b\"\n{body}\n");
    let cases: [(String, usize, &str); 16] = [
        ("[[constraint]]\nname =\n".into(), 2, ""),
        (
            "[[constraint]]\nkind = \"pack\"\n".into(),
            1,
            "missing field `name`",
        ),
        ("[[rule]]\n".into(), 1, "unknown field `rule`"),
        (table("kind = \"pak\"\nweight = 1"), 3, "no kind \"pak\""),
        (
            table("kind = \"pack\"\nweigth = 1"),
            4,
            "unknown field `weigth`",
        ),
        (table("kind = \"pack\"\nweight = -1"), 4, "invalid value"),
        (
            table("kind = \"pack\""),
            1,
            "needs `hard = true` or a weight",
        ),
        (table("kind = \"pack\"\nhard = true"), 1, "can't be hard"),
        (
            table("kind = \"pack\"\nweight = 200000"),
            1,
            "weights go up to 100000",
        ),
        (
            table("kind = \"headroom\"\nhard = true"),
            1,
            "limits nothing",
        ),
        (
            table("kind = \"failure-domain\"\nweight = 1\npercent = 0"),
            1,
            "1 to 100",
        ),
        (
            table("kind = \"pin\"\nhard = true\nvm = 0\nvcpu = 1"),
            1,
            "pins need `vm`, `vcpu` and `node`",
        ),
        (
            second("kind = \"spread\"\nweight = 1"),
            41,
            "contradicts another constraint: \"few-nodes\" in line 10",
        ),
        (
            second("kind = \"pin\"\nhard = true\nvm = 0\nvcpu = 0\nnode = 2"),
            41,
            "\"console-vcpu\" in line 33",
        ),
        (
            second("kind = \"headroom\"\nhard = true\ncores = 2"),
            41,
            "\"room-for-the-host\" in line 3",
        ),
        (
            FINE.replace("few-nodes", "stay"),
            27,
            "another constraint has this name",
        ),
    ];
    for (text, line, reason) in cases {
        let error = parse(&text).expect_err("a faulty policy");
        assert_eq!(error.line, line, "{error} in\n{text}");
        assert!(error.reason.contains(reason), "{error} in\n{text}");
        assert!(!error.reason.contains('\n'), "one line: {error}");
    }
}

#[test]
fn built_in_names_are_taken() {
    for name in ["capacity", "cordon", "drain"] {
        let error = parse(&FINE.replace("few-nodes", name)).expect_err("taken");
        assert_eq!(
            (error.line, error.reason.contains("has this name")),
            (10, true)
        );
    }
}

#[test]
fn a_faulty_policy_leaves_the_old_one_in_force() {
    let mut cluster = Cluster::default();
    let policy = parse(FINE).expect("a policy");
    let load = Op::from(Change::LoadPolicy);
    cluster
        .apply(&load, policy.as_bytes(), at())
        .expect("loaded");
    let mut broken = policy.as_bytes().to_vec();
    // The second rule gets the first one's name.
    broken.copy_within(0..32, 60);
    let refusal = cluster.apply(&load, &broken, at()).expect_err("refused");
    let Refusal::Policy(error) = refusal else {
        panic!("{refusal:?}");
    };
    assert_eq!((error.rule, error.fault), (1, Fault::NameTaken));
    assert_eq!(cluster.policy(), &policy);
    let half = &policy.as_bytes()[..90];
    assert!(cluster.apply(&load, half, at()).is_err());
    assert_eq!(cluster.policy(), &policy);
}

proptest! {
    #[test]
    fn no_text_and_no_bytes_are_too_strange(text in ".{0,200}", noise in prop::collection::vec(any::<u8>(), 0..300)) {
        // Whatever it says, it says it.
        let _ = parse(&text);
        if let Ok(policy) = Policy::from_bytes(&noise) {
            prop_assert_eq!(policy.as_bytes(), &noise[..]);
        }
    }

    #[test]
    fn a_policy_with_some_bytes_changed_is_refused_or_is_what_it_says(
        changes in prop::collection::vec((0_usize..360, any::<u8>()), 1..4),
    ) {
        let mut bytes = parse(FINE).expect("a policy").as_bytes().to_vec();
        for (place, value) in changes {
            bytes[place] = value;
        }
        if let Ok(policy) = Policy::from_bytes(&bytes) {
            prop_assert_eq!(policy.as_bytes(), &bytes[..]);
        }
    }
}

#[test]
fn a_policy_that_is_printed_reads_the_same() {
    let text = r#"
[[constraint]]
name = "say \"no\" to two"
kind = "spread"
hard = true
cores = 3
node = 1
[[constraint]]
name = "few"
kind = "pack"
weight = 7
[[constraint]]
name = "far"
kind = "failure-domain"
percent = 60
weight = 5
slice-weight = 1
[[constraint]]
name = "stay"
kind = "fewest-moves"
weight = 5
[[constraint]]
name = "pinned"
kind = "pin"
hard = true
vm = 0
vcpu = 0
node = 0
"#;
    let policy = parse(text).expect("a policy");
    let printed = control_plane::policy::text::print(&policy);
    assert_eq!(parse(&printed).as_ref(), Ok(&policy), "{printed}");
}
