//! Policies as operators write them: TOML, one table per constraint.
//!
//! ```toml
//! [[constraint]]
//! name = "room-for-the-host"      # what status, explain and refusals call it
//! kind = "headroom"               # every node keeps free …
//! cores = 1
//! slices = 64                     # … of 2 MiB each
//! hard = true
//!
//! [[constraint]]
//! name = "few-nodes"
//! kind = "pack"
//! weight = 40                     # cost of each node that the VM is on
//!
//! [[constraint]]
//! name = "survive-a-rack"
//! kind = "failure-domain"
//! percent = 60                    # most of a VM in one domain
//! weight = 5                      # soft: cost of each vCPU beyond
//! slice-weight = 1                # and of each slice; without it: weight
//!
//! [[constraint]]
//! name = "console-vcpu"
//! kind = "pin"
//! vm = 0
//! vcpu = 0
//! node = 1
//! ```
//!
//! `vm` and `node` narrow a constraint to one VM and, for `headroom`,
//! `spread` and `pin`, to one node. `spread` is soft with a weight, or hard
//! with the most `cores` and `slices` that a node may give.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use serde::Deserialize;
use toml::Spanned;

use super::{ANY, Fault, Kind, Name, Policy, Rule};

/// Why a text is no policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextError {
    /// The line at fault, from 1 on.
    pub line: usize,
    /// What is wrong with it.
    pub reason: String,
}

impl fmt::Display for TextError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.reason)
    }
}

impl core::error::Error for TextError {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    constraint: Vec<Spanned<Entry>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Entry {
    name: String,
    kind: Spanned<String>,
    #[serde(default)]
    hard: bool,
    vm: Option<u16>,
    node: Option<u16>,
    vcpu: Option<u16>,
    cores: Option<u32>,
    slices: Option<u32>,
    percent: Option<u32>,
    weight: Option<u32>,
    slice_weight: Option<u32>,
}

/// Reads a policy.
///
/// # Errors
/// The first line at fault, and why.
pub fn parse(text: &str) -> Result<Policy, TextError> {
    let at = |offset: usize, reason: String| TextError {
        line: line_of(text, offset),
        reason,
    };
    let file: File = toml::from_str(text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start);
        at(start, one_line(error.message()))
    })?;
    let mut rules = Vec::new();
    for entry in &file.constraint {
        let rule = rule(entry.get_ref())
            .map_err(|(offset, reason)| at(offset.unwrap_or(entry.span().start), reason))?;
        rules.push(rule);
    }
    Policy::new(rules).map_err(|error| {
        let entry = file.constraint.get(error.rule);
        let start = entry.map_or(0, |entry| entry.span().start);
        let mut reason = error.fault.to_string();
        if let Some(entry) = entry {
            reason = alloc::format!("constraint \"{}\": {reason}", entry.get_ref().name);
        }
        if let Fault::Contradicts(other) = error.fault
            && let Some(other) = file.constraint.get(other)
        {
            let line = line_of(text, other.span().start);
            reason = alloc::format!("{reason}: \"{}\" in line {line}", other.get_ref().name);
        }
        at(start, reason)
    })
}

/// Writes a policy such that [`parse`] reads the same.
#[must_use]
pub fn print(policy: &Policy) -> String {
    let mut text = String::new();
    for rule in policy.rules() {
        let name = toml::Value::from(rule.name.to_string());
        text += "[[constraint]]\n";
        text += &alloc::format!("name = {name}\nkind = \"{}\"\n", rule.kind.name());
        if rule.hard {
            text += "hard = true\n";
        }
        let numbers = [("vm", rule.vm), ("vcpu", rule.vcpu), ("node", rule.node)];
        for (key, value) in numbers.iter().filter(|pair| pair.1 != ANY) {
            text += &alloc::format!("{key} = {value}\n");
        }
        let numbers = [
            ("cores", rule.vcpus),
            ("slices", rule.slices),
            ("percent", rule.percent),
            ("weight", rule.weight),
        ];
        for (key, value) in numbers.iter().filter(|pair| pair.1 != 0) {
            text += &alloc::format!("{key} = {value}\n");
        }
        if rule.slice_weight != unsaid_slice_weight(rule.kind, rule.weight) {
            text += &alloc::format!("slice-weight = {}\n", rule.slice_weight);
        }
        text += "\n";
    }
    text
}

/// vCPUs and slices cost alike unless told apart; nodes are no units.
const fn unsaid_slice_weight(kind: Kind, weight: u32) -> u32 {
    match kind {
        Kind::Pack => 0,
        _ => weight,
    }
}

fn rule(entry: &Entry) -> Result<Rule, (Option<usize>, String)> {
    let name = Name::new(&entry.name).ok_or_else(|| (None, Fault::BadName.to_string()))?;
    let wanted = entry.kind.get_ref();
    let kind = Kind::NAMES.iter().find(|kind| kind.1 == wanted);
    let Some((kind, _)) = kind else {
        let names: Vec<&str> = Kind::NAMES.iter().map(|kind| kind.1).collect();
        let reason = alloc::format!("no kind \"{wanted}\"; there are {}", names.join(", "));
        return Err((Some(entry.kind.span().start), reason));
    };
    let weight = entry.weight.unwrap_or(0);
    let slice_weight = unsaid_slice_weight(*kind, weight);
    Ok(Rule {
        hard: entry.hard,
        vm: entry.vm.unwrap_or(ANY),
        node: entry.node.unwrap_or(ANY),
        vcpu: entry.vcpu.unwrap_or(ANY),
        vcpus: entry.cores.unwrap_or(0),
        slices: entry.slices.unwrap_or(0),
        percent: entry.percent.unwrap_or(0),
        weight,
        slice_weight: entry.slice_weight.unwrap_or(slice_weight),
        ..Rule::new(name, *kind)
    })
}

fn line_of(text: &str, offset: usize) -> usize {
    let before = text.as_bytes().iter().take(offset);
    before.filter(|byte| **byte == b'\n').count() + 1
}

/// Messages of the parser may have several lines.
fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}
