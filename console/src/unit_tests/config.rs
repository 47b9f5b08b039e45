//! A tree's `unittests.cfg`.
//!
//! Sections in brackets, one for each test, and `key = value` lines. Values are
//! words of a shell; of that only quotes are known here, and the one command
//! that the tree uses, `date +%s`.

use std::time::{SystemTime, UNIX_EPOCH};

/// One test of a tree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Test {
    pub name: String,
    /// The image's file name.
    pub file: String,
    pub smp: u32,
    arguments: Vec<String>,
    /// QEMU's options.
    pub options: Vec<String>,
    pub groups: Vec<String>,
    pub arch: Option<String>,
    /// Only with this accelerator.
    pub accelerator: Option<String>,
    /// Files of the host with what they must hold.
    pub check: Vec<(String, String)>,
    /// Seconds.
    pub timeout: Option<u64>,
}

impl Test {
    /// The image's arguments, if the test starts now.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let now = seconds();
        let words = self.arguments.iter();
        words.map(|word| word.replace(NOW, &now)).collect()
    }

    /// Memory in MiB that QEMU is told to give, if it is.
    pub(crate) fn memory_mib(&self) -> Option<u64> {
        let at = self.options.iter().position(|word| word == "-m")?;
        let size = self.options.get(at + 1)?.to_ascii_lowercase();
        match size.strip_suffix('g') {
            Some(gib) => gib.parse::<u64>().ok()?.checked_mul(1024),
            None => size.trim_end_matches('m').parse().ok(),
        }
    }

    /// Why the test can't run on any processor of this kind.
    pub(crate) fn skip_reason(&self, accelerator: &str) -> Option<String> {
        if self.groups.iter().any(|group| group == "nodefault") {
            return Some("marked as manual run only".into());
        }
        if let Some(arch) = self.arch.as_deref().filter(|arch| *arch != "x86_64") {
            return Some(format!("{arch} only"));
        }
        if let Some(only) = self
            .accelerator
            .as_deref()
            .filter(|only| *only != accelerator)
        {
            return Some(format!("{only} only"));
        }
        self.check.iter().find_map(|(path, wanted)| {
            let found = std::fs::read_to_string(path).unwrap_or_default();
            (found.trim_end() != wanted).then(|| format!("{path} is not {wanted}"))
        })
    }
}

/// The tests of a configuration, in its order. Lines that say nothing known are
/// passed over, as the tree's own scripts do.
pub(crate) fn parse(text: &str) -> Vec<Test> {
    let mut tests: Vec<Test> = Vec::new();
    for line in text.lines().map(str::trim) {
        let name = line
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'));
        if let Some(name) = name {
            tests.push(Test {
                name: name.to_owned(),
                smp: 1,
                ..Test::default()
            });
            continue;
        }
        let (Some((key, value)), Some(test)) = (line.split_once('='), tests.last_mut()) else {
            continue;
        };
        let value = value.trim();
        let word = || words(value).into_iter().next();
        match key.trim() {
            "file" => test.file = value.to_owned(),
            "smp" => test.smp = value.parse().unwrap_or(1),
            // The shell takes one pair of quotes off, the image splits.
            "test_args" => {
                let words = words(value).join(" ");
                test.arguments = words.split_whitespace().map(str::to_owned).collect();
            }
            "qemu_params" | "extra_params" => test.options = words(value),
            "groups" => test.groups = words(value),
            "arch" => test.arch = word(),
            "accel" => test.accelerator = word(),
            "check" => {
                let pair = |word: &String| word.split_once('=').map(|(a, b)| (a.into(), b.into()));
                test.check = words(value).iter().filter_map(pair).collect();
            }
            "timeout" => test.timeout = value.trim_end_matches('s').parse().ok(),
            _ => {}
        }
    }
    tests
}

/// Stands for the command until the test runs.
const NOW: &str = "`date+%s`";

/// Splits as a shell does, but leaves [`NOW`] for later.
fn words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = None::<String>;
    let mut quote = None;
    for character in text.replace("`date +%s`", NOW).chars() {
        match (character, quote) {
            ('\'' | '"', None) => {
                quote = Some(character);
                word.get_or_insert_default();
            }
            (character, Some(open)) if character == open => quote = None,
            (character, None) if character.is_whitespace() => words.extend(word.take()),
            (character, _) => word.get_or_insert_default().push(character),
        }
    }
    words.extend(word);
    words
}

fn seconds() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
# a comment = nothing
stray = line
[one]
file = one.flat
smp = 3
test_args = 'a b'
qemu_params = -cpu max,+x -m 4g
groups = fast apic
timeout = 30

[two]
file = two.flat
arch = i386
test_args = \"-x `date +%s`\"
check = /proc/nothing/here=Y /proc/other=N
accel = kvm
timeout = 90s
";

    #[test]
    fn tests_are_read_with_their_settings() {
        let tests = parse(TEXT);
        let [one, two] = &tests[..] else {
            panic!("{tests:?}")
        };
        assert_eq!((&*one.name, &*one.file, one.smp), ("one", "one.flat", 3));
        assert_eq!(one.arguments(), ["a", "b"]);
        assert_eq!(one.options, ["-cpu", "max,+x", "-m", "4g"]);
        assert_eq!((one.memory_mib(), one.timeout), (Some(4096), Some(30)));
        assert_eq!(one.groups, ["fast", "apic"]);
        assert_eq!(one.skip_reason("tcg"), None);
        assert_eq!(
            (two.smp, two.timeout, two.memory_mib()),
            (1, Some(90), None)
        );
        assert!(two.arguments()[1].parse::<u64>().expect("seconds") > 1_700_000_000);
        assert_eq!(two.check.len(), 2);
    }

    #[test]
    fn what_cannot_run_says_why() {
        let test = |change: fn(&mut Test)| {
            let mut test = Test::default();
            change(&mut test);
            test.skip_reason("tcg").unwrap_or_default()
        };
        assert_eq!(test(|_| ()), "");
        assert!(test(|test| test.arch = Some("i386".into())).contains("i386"));
        assert!(test(|test| test.accelerator = Some("kvm".into())).contains("kvm"));
        assert!(test(|test| test.groups = vec!["nodefault".into()]).contains("manual"));
        let check = |test: &mut Test| test.check = vec![("/nonexistent".into(), "Y".into())];
        assert!(test(check).contains("/nonexistent"));
    }

    #[test]
    fn broken_lines_are_passed_over() {
        for text in [
            "",
            "[",
            "]=",
            "=",
            "[a",
            "[]\n=\nfile",
            "[a]\nsmp = x\ntest_args = 'b",
        ] {
            for test in parse(text) {
                assert_eq!(test.smp, 1);
            }
        }
    }
}
