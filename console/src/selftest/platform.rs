//! Known platforms: what each does otherwise than the manual says.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use serde::Deserialize;

use super::Case;
use super::collect::Outcome;

/// The reviewed list: for each platform the cases that fail on it, with the
/// reason.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Platforms(BTreeMap<String, BTreeMap<String, String>>);

/// How well the findings fit a platform.
#[derive(Clone, Debug)]
pub(super) struct Fit<'a> {
    pub name: &'a str,
    known: &'a BTreeMap<String, String>,
    /// Cases that fail, and do not on this platform.
    pub unknown: Vec<&'a str>,
    /// Cases that pass, and do not on this platform.
    pub surprises: Vec<&'a str>,
    /// Cases that fail as they do on this platform.
    found: usize,
    /// Other platforms of which the same is true: the cases don't tell.
    pub others: Vec<&'a str>,
}

impl Fit<'_> {
    /// Whether nothing differs.
    pub(super) fn is_exact(&self) -> bool {
        self.unknown.is_empty() && self.surprises.is_empty()
    }

    /// Why this case fails there, if it does.
    pub(super) fn reason(&self, case: &str) -> Option<&str> {
        self.known.get(case).map(String::as_str)
    }

    pub(super) fn sentence(&self) -> String {
        let name = self.name;
        match (self.is_exact(), self.found) {
            (true, found) if !self.others.is_empty() => format!(
                "These cases, with {found} deviations, fit several platforms: {name}; {}.",
                self.others.join("; ")
            ),
            (true, 0) => format!("By its findings the platform is {name}: it deviates nowhere."),
            (true, found) => {
                format!("By its findings the platform is {name}: all {found} deviations are known.")
            }
            (false, found) => {
                let mut text = format!(
                    "The platform is none that is known. Nearest is {name}, with {found} of its deviations."
                );
                for (what, cases) in [("More fail", &self.unknown), ("More pass", &self.surprises)]
                {
                    if !cases.is_empty() {
                        text += &format!(" {what}: {}.", cases.join(", "));
                    }
                }
                text
            }
        }
    }
}

impl Platforms {
    /// The list that is part of this program.
    ///
    /// # Panics
    /// Never: a test reads it.
    pub(super) fn list() -> Self {
        toml::from_str(include_str!("platforms.toml")).expect("a test reads it")
    }

    /// Checks that a platform is on the list.
    pub(super) fn check(&self, name: &str) -> Result<()> {
        if !self.0.contains_key(name) {
            let names: Vec<_> = self.0.keys().map(|name| format!("\"{name}\"")).collect();
            bail!("{name}: no such platform; known are {}", names.join(", "));
        }
        Ok(())
    }

    /// The platform that these findings fit best, or the one that is asked
    /// for.
    pub(super) fn best<'a>(&'a self, cases: &'a [Case], asked: Option<&str>) -> Fit<'a> {
        let wanted = |name: &str| asked.is_none_or(|asked| asked == name);
        let all = self.0.iter().filter(|(name, _)| wanted(name));
        let mut fits: Vec<_> = all.map(|(name, known)| fit(name, known, cases)).collect();
        // Stable: of equals the first on the list.
        fits.sort_by_key(|fit| fit.unknown.len() + fit.surprises.len());
        let exact = fits.iter().skip(1).filter(|fit| fit.is_exact());
        let others = exact.map(|fit| fit.name).collect();
        let best = fits.into_iter().next();
        let best = best.expect("the list is not empty, and the name has been checked");
        Fit { others, ..best }
    }
}

fn fit<'a>(name: &'a str, known: &'a BTreeMap<String, String>, cases: &'a [Case]) -> Fit<'a> {
    let mut fit = Fit {
        name,
        known,
        unknown: Vec::new(),
        surprises: Vec::new(),
        found: 0,
        others: Vec::new(),
    };
    for case in cases {
        match (&case.outcome, known.contains_key(&case.name)) {
            (Outcome::Fail { .. }, true) => fit.found += 1,
            (Outcome::Fail { .. }, false) => fit.unknown.push(&case.name),
            (Outcome::Pass, true) => fit.surprises.push(&case.name),
            _ => {}
        }
    }
    fit
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn cases(outcomes: &[(&str, bool)]) -> Vec<Case> {
        let case = |(name, passes): &(&str, bool)| Case {
            name: (*name).into(),
            section: String::new(),
            outcome: match passes {
                true => Outcome::Pass,
                false => Outcome::Fail {
                    expected: String::new(),
                    seen: String::new(),
                },
            },
            took: Duration::ZERO,
        };
        outcomes.iter().map(case).collect()
    }

    fn platforms() -> Platforms {
        toml::from_str("[none]\n[old]\na = \"lacks a\"\nb = \"lacks b\"\n[new]\na = \"lacks a\"\n")
            .expect("legal")
    }

    #[test]
    fn the_list_can_be_read_and_gives_reasons() {
        let list = Platforms::list();
        assert!(list.0.len() > 2, "{list:?}");
        let mut reasons = list.0.values().flat_map(BTreeMap::values);
        assert!(reasons.all(|reason| reason.len() > 10), "{list:?}");
    }

    #[test]
    fn findings_name_their_platform() {
        let platforms = platforms();
        for (a, b, name) in [
            (false, false, "old"),
            (false, true, "new"),
            (true, true, "none"),
        ] {
            let cases = cases(&[("a", a), ("b", b), ("c", true)]);
            let fit = platforms.best(&cases, None);
            assert_eq!((fit.name, fit.is_exact()), (name, true));
            assert!(fit.others.is_empty(), "{fit:?}");
        }
        let too_few = [&cases(&[("a", false)])[..], &cases(&[("c", true)])];
        let others = too_few.map(|cases| platforms.best(cases, None).others.len());
        assert_eq!(others, [1, 2]);
    }

    #[test]
    fn what_differs_is_named() {
        let platforms = platforms();
        let cases = cases(&[("a", false), ("b", true), ("c", false)]);
        let fit = platforms.best(&cases, None);
        assert_eq!((fit.name, fit.is_exact()), ("new", false));
        assert!(
            fit.sentence().contains("More fail: c."),
            "{}",
            fit.sentence()
        );
        let asked = platforms.best(&cases, Some("old"));
        assert_eq!((asked.unknown, asked.surprises), (vec!["c"], vec!["b"]));
        assert!(platforms.check("x").is_err());
    }
}
