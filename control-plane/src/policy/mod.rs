//! Constraints that an operator declares, by name.
//!
//! A policy is a list of [`Rule`]s: fixed-layout records, so that a policy is
//! loaded into a running cluster as the payload of one log entry. Operators
//! write it as text (`text`, a host's matter); [`Policy::new`] is what both
//! ways in have to pass, and a policy that does not leaves the old one in
//! force.
//!
//! Besides the rules there are three constraints that nobody declares:
//! `capacity`, `cordon` and `drain`; see [`Cause`](crate::place::Cause).

#[cfg(feature = "text")]
pub mod text;

use alloc::vec::Vec;
use core::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, TryFromBytes};

use crate::optimise::{MAX_COUNT, MAX_WEIGHT};

/// Most rules of a policy.
pub const MAX_RULES: usize = 64;

/// What a rule constrains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, TryFromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(u8)]
pub enum Kind {
    /// Cores and slices that nodes keep free.
    Headroom = 1,
    /// A VM is on few nodes: each costs.
    Pack = 2,
    /// A VM is on many nodes: hard, each gives so much at most; soft, what it
    /// gives beyond the even share costs.
    Spread = 3,
    /// No failure domain gives more than a percentage of a VM.
    Domain = 4,
    /// Slices are on nodes that have vCPUs for them.
    Near = 5,
    /// What runs stays where it is.
    FewestMoves = 6,
    /// A vCPU is on one node.
    Pin = 7,
}

impl Kind {
    /// All kinds, with their names in policy files.
    pub const NAMES: [(Self, &'static str); 7] = [
        (Self::Headroom, "headroom"),
        (Self::Pack, "pack"),
        (Self::Spread, "spread"),
        (Self::Domain, "failure-domain"),
        (Self::Near, "near-memory"),
        (Self::FewestMoves, "fewest-moves"),
        (Self::Pin, "pin"),
    ];

    /// The name in policy files.
    #[must_use]
    pub fn name(self) -> &'static str {
        let named = Self::NAMES.iter().find(|named| named.0 == self);
        named.map_or("", |named| named.1)
    }
}

/// A rule's name: up to 32 bytes of UTF-8, padded with zeros.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct Name([u8; 32]);

impl Name {
    /// A name of 1 to 32 bytes without control characters.
    #[must_use]
    pub fn new(text: &str) -> Option<Self> {
        let mut bytes = [0; 32];
        let fine = !text.is_empty() && !text.chars().any(char::is_control);
        bytes
            .get_mut(..text.len())?
            .copy_from_slice(text.as_bytes());
        fine.then_some(Self(bytes))
    }

    /// The text, or `None` if the bytes are none that [`new`](Self::new) makes.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        let len = self
            .0
            .iter()
            .position(|byte| *byte == 0)
            .unwrap_or(self.0.len());
        let (text, padding) = self.0.split_at(len);
        let text = core::str::from_utf8(text).ok()?;
        (Self::new(text).is_some() && padding.iter().all(|byte| *byte == 0)).then_some(text)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.text().unwrap_or("?"))
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// "Every VM", "every node", "no vCPU".
pub const ANY: u16 = u16::MAX;

/// One constraint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, TryFromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Rule {
    /// What an operator calls it.
    pub name: Name,
    /// What it constrains.
    pub kind: Kind,
    /// Whether it must hold; else breaking it costs the weights.
    pub hard: bool,
    /// To which VM it applies, or [`ANY`].
    pub vm: u16,
    /// To which node it applies, or [`ANY`].
    pub node: u16,
    /// Of a pin: the vCPU.
    pub vcpu: u16,
    /// Headroom: cores kept free. Hard spread: most vCPUs of a node.
    pub vcpus: u32,
    /// Headroom: slices kept free. Hard spread: most slices of a node.
    pub slices: u32,
    /// Failure domain: most percent of a VM.
    pub percent: u32,
    /// Cost of each vCPU, or of each node.
    pub weight: u32,
    /// Cost of each slice.
    pub slice_weight: u32,
}

const _: () = assert!(size_of::<Rule>() == 60, "part of the log's format");

impl Rule {
    /// A soft rule of a kind for all VMs and nodes, without any numbers.
    #[must_use]
    pub const fn new(name: Name, kind: Kind) -> Self {
        Self {
            name,
            kind,
            hard: false,
            vm: ANY,
            node: ANY,
            vcpu: ANY,
            vcpus: 0,
            slices: 0,
            percent: 0,
            weight: 0,
            slice_weight: 0,
        }
    }

    /// Whether it applies to a VM.
    #[must_use]
    pub const fn applies_to(&self, vm: u16) -> bool {
        self.vm == ANY || self.vm == vm
    }

    /// Whether it applies to a node.
    #[must_use]
    pub const fn applies_at(&self, node: u16) -> bool {
        self.node == ANY || self.node == node
    }

    fn meets(&self, other: &Self) -> bool {
        let same = |a: u16, b: u16| a == ANY || b == ANY || a == b;
        same(self.vm, other.vm) && same(self.node, other.node)
    }
}

/// Why a list of rules is no policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PolicyError {
    /// The rule at fault; 0 if it is none in particular.
    pub rule: usize,
    /// What is wrong with it.
    pub fault: Fault,
}

/// What can be wrong with a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The bytes make no rules.
    Malformed,
    /// More than [`MAX_RULES`].
    TooMany,
    /// The name is empty or has control characters.
    BadName,
    /// An earlier rule has the name, or the name is a built-in constraint's.
    NameTaken,
    /// A weight beyond [`MAX_WEIGHT`].
    TooHeavy,
    /// A count beyond [`MAX_COUNT`].
    TooLarge,
    /// Soft, and breaking it costs nothing.
    Weightless,
    /// Hard, and with a weight: it would never be paid.
    HardWithWeight,
    /// This kind is always hard.
    NeverSoft,
    /// This kind is never hard.
    NeverHard,
    /// It limits nothing: its numbers are missing.
    Empty,
    /// The percentage is not from 1 to 100.
    NoPercentage,
    /// A pin needs a VM, a vCPU and a node, and nothing else does.
    BadScope,
    /// An earlier rule demands the opposite: its index.
    Contradicts(usize),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed => f.write_str("is no rule of this version"),
            Self::TooMany => write!(f, "there are more than {MAX_RULES} constraints"),
            Self::BadName => f.write_str("the name has to be 1 to 32 bytes of printable text"),
            Self::NameTaken => f.write_str("another constraint has this name"),
            Self::TooHeavy => write!(f, "weights go up to {MAX_WEIGHT}"),
            Self::TooLarge => write!(f, "counts go up to {MAX_COUNT}"),
            Self::Weightless => f.write_str("needs `hard = true` or a weight"),
            Self::HardWithWeight => f.write_str("is hard: a weight would never be paid"),
            Self::NeverSoft => f.write_str("this kind is always hard"),
            Self::NeverHard => f.write_str("this kind can't be hard: give it a weight"),
            Self::Empty => f.write_str("limits nothing: give it counts"),
            Self::NoPercentage => f.write_str("needs `percent` from 1 to 100"),
            Self::BadScope => f.write_str(
                "pins need `vm`, `vcpu` and `node`; others take no `vcpu`, and only `headroom` and \
                 `spread` a `node`",
            ),
            Self::Contradicts(_) => f.write_str("contradicts another constraint"),
        }
    }
}

/// A list of rules without faults.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy(Vec<Rule>);

impl Policy {
    /// Checks the rules, each by itself and against those before.
    ///
    /// # Errors
    /// The first rule at fault.
    pub fn new(rules: Vec<Rule>) -> Result<Self, PolicyError> {
        if rules.len() > MAX_RULES {
            return Err(PolicyError {
                rule: MAX_RULES,
                fault: Fault::TooMany,
            });
        }
        for (index, rule) in rules.iter().enumerate() {
            let before = &rules[..index];
            check_alone(rule)
                .and_then(|()| check_against(rule, before))
                .map_err(|fault| PolicyError { rule: index, fault })?;
        }
        Ok(Self(rules))
    }

    /// Reads the binary form: whole [`Rule`]s, one after the other.
    ///
    /// # Errors
    /// The first rule at fault.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, PolicyError> {
        let mut rules = Vec::new();
        let mut rest = bytes;
        while !rest.is_empty() {
            let (rule, tail) = Rule::try_read_from_prefix(rest).map_err(|_| PolicyError {
                rule: rules.len(),
                fault: Fault::Malformed,
            })?;
            rules.push(rule);
            rest = tail;
            if rules.len() > MAX_RULES {
                break;
            }
        }
        Self::new(rules)
    }

    /// The binary form.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// The rules.
    #[must_use]
    pub fn rules(&self) -> &[Rule] {
        &self.0
    }
}

fn check_alone(rule: &Rule) -> Result<(), Fault> {
    let Some(name) = rule.name.text() else {
        return Err(Fault::BadName);
    };
    let fault = if ["capacity", "cordon", "drain"].contains(&name) {
        Fault::NameTaken
    } else if rule.weight.max(rule.slice_weight) > MAX_WEIGHT {
        Fault::TooHeavy
    } else if rule.vcpus.max(rule.slices) > MAX_COUNT {
        Fault::TooLarge
    } else if !is_scope_legal(rule) {
        Fault::BadScope
    } else if rule.hard && (rule.weight > 0 || rule.slice_weight > 0) {
        Fault::HardWithWeight
    } else if rule.hard && matches!(rule.kind, Kind::Pack | Kind::Near | Kind::FewestMoves) {
        Fault::NeverHard
    } else if !rule.hard && rule.kind == Kind::Pin {
        Fault::NeverSoft
    } else if !rule.hard && rule.weight == 0 && rule.slice_weight == 0 {
        Fault::Weightless
    } else if rule.kind == Kind::Domain && !(1..=100).contains(&rule.percent) {
        Fault::NoPercentage
    } else if (rule.kind == Kind::Headroom || (rule.kind == Kind::Spread && rule.hard))
        && rule.vcpus == 0
        && rule.slices == 0
    {
        Fault::Empty
    } else {
        return Ok(());
    };
    Err(fault)
}

/// Pins say all of VM, vCPU and node; a node alone makes sense for few others.
const fn is_scope_legal(rule: &Rule) -> bool {
    match rule.kind {
        Kind::Pin => rule.vm != ANY && rule.node != ANY && rule.vcpu != ANY,
        Kind::Headroom | Kind::Spread => rule.vcpu == ANY,
        Kind::Pack | Kind::Domain | Kind::Near | Kind::FewestMoves => {
            rule.vcpu == ANY && rule.node == ANY
        }
    }
}

fn check_against(rule: &Rule, before: &[Rule]) -> Result<(), Fault> {
    if before.iter().any(|other| other.name == rule.name) {
        return Err(Fault::NameTaken);
    }
    let opposite = |other: &Rule| match (rule.kind, other.kind) {
        // Each vCPU has one place; so one pin.
        (Kind::Pin, Kind::Pin) => rule.vm == other.vm && rule.vcpu == other.vcpu,
        (Kind::Pack, Kind::Spread) | (Kind::Spread, Kind::Pack) => {
            !rule.hard && !other.hard && rule.meets(other)
        }
        // Two of these for the same VM and node: which one holds?
        (Kind::Pack, Kind::Pack)
        | (Kind::Near, Kind::Near)
        | (Kind::FewestMoves, Kind::FewestMoves)
        | (Kind::Headroom, Kind::Headroom)
        | (Kind::Spread, Kind::Spread)
        | (Kind::Domain, Kind::Domain) => rule.hard == other.hard && rule.meets(other),
        _ => false,
    };
    match before.iter().position(opposite) {
        Some(other) => Err(Fault::Contradicts(other)),
        None => Ok(()),
    }
}
