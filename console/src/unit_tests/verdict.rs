//! Whose fault a failure is.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::trial::{Ending, Trial};
use crate::report::Status;

/// What a test says about Viaduct.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Pass,
    /// Why it did not run, or what it said.
    Skip(String),
    /// It fails here, and for the same reason without us.
    Platform(String),
    /// It fails here only, which is known: the reason.
    Expected(String),
    /// It fails here only.
    Ours(String),
    /// It passes, though it is listed as failing.
    Surprise,
}

impl Verdict {
    /// Whether a run with this verdict has failed.
    pub(crate) fn is_bad(&self) -> bool {
        self.status() == Status::Failed
    }

    pub(crate) fn status(&self) -> Status {
        match self {
            Self::Pass => Status::Passed,
            Self::Skip(_) => Status::Skipped,
            Self::Platform(_) | Self::Expected(_) => Status::Known,
            Self::Ours(_) | Self::Surprise => Status::Failed,
        }
    }

    pub(crate) fn word(&self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Skip(_) => "skip",
            Self::Platform(_) => "platform",
            Self::Expected(_) => "expected",
            Self::Ours(_) => "FAIL",
            Self::Surprise => "SURPRISE",
        }
    }

    pub(crate) fn why(&self) -> &str {
        match self {
            Self::Pass => "",
            Self::Skip(why) | Self::Platform(why) | Self::Expected(why) | Self::Ours(why) => why,
            Self::Surprise => "it passes; take it off the list of expected failures",
        }
    }
}

/// The reviewed list of tests that fail here, with reasons.
#[derive(Debug, Deserialize)]
pub(crate) struct ExpectedFailures(BTreeMap<String, String>);

impl ExpectedFailures {
    /// The list that is part of this program.
    ///
    /// # Panics
    /// Never: a test reads it.
    pub(crate) fn list() -> Self {
        toml::from_str(include_str!("expected.toml")).expect("a test reads it")
    }

    /// Judges a test by what it did here and, if it ran there, without us.
    pub(crate) fn judge(&self, name: &str, here: &Trial, there: Option<&Trial>) -> Verdict {
        let known = self.0.get(name);
        match here.ending {
            Ending::Pass if known.is_some() => return Verdict::Surprise,
            Ending::Pass => return Verdict::Pass,
            Ending::Skip => return Verdict::Skip(skip_line(here)),
            _ => {}
        }
        if let Some(why) = there.and_then(|there| same_failure(here, there)) {
            return Verdict::Platform(why);
        }
        match known {
            Some(reason) => Verdict::Expected(reason.clone()),
            None => Verdict::Ours(here.essence()),
        }
    }
}

/// What the test said when it found nothing to test.
fn skip_line(trial: &Trial) -> String {
    let line = trial.output.lines().find(|line| line.contains("SKIP"));
    line.unwrap_or("it has nothing to test here")
        .trim()
        .to_owned()
}

/// The failure, if it is no worse here than there.
fn same_failure(here: &Trial, there: &Trial) -> Option<String> {
    match there.ending {
        // With nothing to test there, what is tested here is ours.
        Ending::Pass | Ending::Skip => None,
        Ending::Fail => {
            let known = there.failures();
            let all_known = here.failures().iter().all(|line| known.contains(line));
            let fails = here.ending == Ending::Fail && !here.failures().is_empty();
            (fails && all_known).then(|| there.essence())
        }
        // It got less far there, and so says nothing against us.
        Ending::Hang | Ending::Flood | Ending::Broken(_) => Some(there.essence()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn trial(ending: Ending, output: &str) -> Trial {
        Trial {
            ending,
            output: output.into(),
            took: Duration::ZERO,
        }
    }

    fn judge(name: &str, here: &Trial, there: &Trial) -> Verdict {
        let list = [("known".to_owned(), "by design".to_owned())];
        ExpectedFailures(list.into()).judge(name, here, Some(there))
    }

    #[test]
    fn the_list_can_be_read_and_gives_reasons() {
        let list = ExpectedFailures::list();
        assert!(list.0.values().all(|reason| reason.len() > 10), "{list:?}");
    }

    #[test]
    fn a_failure_is_ours_if_it_is_not_there_without_us() {
        let pass = trial(Ending::Pass, "");
        let fail = trial(Ending::Fail, "FAIL: a\nPASS: b");
        let worse = trial(Ending::Fail, "FAIL: a\nFAIL: b");
        let hang = trial(Ending::Hang, "PASS: b");
        assert_eq!(judge("x", &pass, &fail), Verdict::Pass);
        assert_eq!(judge("x", &fail, &pass), Verdict::Ours("FAIL: a".into()));
        assert_eq!(
            judge("x", &fail, &fail),
            Verdict::Platform("FAIL: a".into())
        );
        assert_eq!(judge("x", &worse, &fail), Verdict::Ours("FAIL: a".into()));
        assert_eq!(judge("x", &hang, &fail), Verdict::Ours("PASS: b".into()));
        assert!(matches!(judge("x", &fail, &hang), Verdict::Platform(_)));
        let skip = trial(Ending::Skip, "SKIP: no clock");
        assert_eq!(judge("x", &fail, &skip), Verdict::Ours("FAIL: a".into()));
    }

    #[test]
    fn known_failures_have_their_reason_and_must_stay() {
        let pass = trial(Ending::Pass, "");
        let fail = trial(Ending::Fail, "FAIL: a");
        assert_eq!(
            judge("known", &fail, &pass),
            Verdict::Expected("by design".into())
        );
        assert_eq!(judge("known", &pass, &pass), Verdict::Surprise);
        assert!(Verdict::Surprise.is_bad() && !Verdict::Expected(String::new()).is_bad());
    }
}
