//! Cases, and what they find.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt::{Display, LowerHex};

use crate::lab::Lab;

/// Why a case does not pass.
#[derive(Clone, Debug)]
pub(crate) enum Finding {
    /// The platform does something else.
    Wrong { expected: String, seen: String },
    /// It does not claim to have this.
    Missing(&'static str),
}

pub(crate) type Verdict = Result<(), Finding>;

/// Compares numbers.
pub(crate) fn same<T: PartialEq + LowerHex>(what: &str, expected: T, seen: T) -> Verdict {
    holds(expected == seen, || {
        (format!("{what} {expected:#x}"), format!("{seen:#x}"))
    })
}

/// Compares what has a name.
pub(crate) fn equal<T: PartialEq + Display>(expected: T, seen: T) -> Verdict {
    holds(expected == seen, || {
        (expected.to_string(), seen.to_string())
    })
}

/// A condition, and what was expected and seen if it does not hold.
pub(crate) fn holds<A: Into<String>, B: Into<String>>(
    condition: bool,
    otherwise: impl FnOnce() -> (A, B),
) -> Verdict {
    if condition {
        return Ok(());
    }
    let (expected, seen) = otherwise();
    Err(Finding::Wrong {
        expected: expected.into(),
        seen: seen.into(),
    })
}

/// A feature that the case needs and the processor need not have.
pub(crate) fn needs(has: bool, what: &'static str) -> Verdict {
    match has {
        true => Ok(()),
        false => Err(Finding::Missing(what)),
    }
}

type Test = Box<dyn Fn(&mut Lab) -> Verdict>;

/// One case.
pub(crate) struct Case {
    pub name: String,
    pub section: &'static str,
    pub test: Test,
}

/// All cases, in the order in which they run.
#[derive(Default)]
pub(crate) struct Suite(pub Vec<Case>);

impl Suite {
    /// Adds a case: group and name with a slash between them, and the
    /// section of the manual's volume 2 that it checks.
    pub(crate) fn case(
        &mut self,
        name: impl Into<String>,
        section: &'static str,
        test: impl Fn(&mut Lab) -> Verdict + 'static,
    ) {
        self.0.push(Case {
            name: name.into(),
            section,
            test: Box::new(test),
        });
    }
}
