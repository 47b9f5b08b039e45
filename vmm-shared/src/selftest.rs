//! What a self-test says to the launcher: lines in the log of its node.
//!
//! A line is a mark, the kind of record and its fields, with tabs between
//! them. Fields hold no control characters, so nothing needs quoting. A line
//! that is anything else is no record: the log may say more.
//!
//! ```text
//!   selftest  fact    NAME    VALUE                       about the platform
//!   selftest  plan    FIRST   LAST                        numbers of the cases
//!   selftest  case    NUMBER  NAME  SECTION               begins
//!   selftest  pass    NUMBER                              has ended
//!   selftest  fail    NUMBER  EXPECTED  SEEN
//!   selftest  skip    NUMBER  REASON
//!   selftest  end                                         there are no more
//! ```

use core::fmt;

const MARK: &str = "selftest";

/// One line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record<'a> {
    /// Something about the platform.
    Fact {
        /// What.
        name: &'a str,
        /// Its value.
        value: &'a str,
    },
    /// The first and the last case that will be tried.
    Plan {
        /// Number of the first.
        first: u32,
        /// Number of the last.
        last: u32,
    },
    /// A case begins.
    Case {
        /// Its number.
        number: u32,
        /// Group and name, with a slash between them.
        name: &'a str,
        /// Of AMD's manual, volume 2.
        section: &'a str,
    },
    /// It has ended.
    Ended {
        /// Its number.
        number: u32,
        /// How.
        verdict: Verdict<'a>,
    },
    /// All cases have ended.
    End,
}

/// What a case has found out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict<'a> {
    /// The platform does what it should.
    Pass,
    /// It does something else.
    Fail {
        /// What it should have done.
        expected: &'a str,
        /// What it did.
        seen: &'a str,
    },
    /// It has nothing to try: the reason.
    Skip(&'a str),
}

/// Text without control characters.
struct Field<'a>(&'a str);

impl fmt::Display for Field<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let clean = |c: char| if c.is_control() { ' ' } else { c };
        self.0
            .chars()
            .try_for_each(|c| fmt::Write::write_char(f, clean(c)))
    }
}

impl fmt::Display for Record<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Fact { name, value } => {
                write!(f, "{MARK}\tfact\t{}\t{}", Field(name), Field(value))
            }
            Self::Plan { first, last } => write!(f, "{MARK}\tplan\t{first}\t{last}"),
            Self::Case {
                number,
                name,
                section,
            } => write!(
                f,
                "{MARK}\tcase\t{number}\t{}\t{}",
                Field(name),
                Field(section)
            ),
            Self::Ended { number, verdict } => match verdict {
                Verdict::Pass => write!(f, "{MARK}\tpass\t{number}"),
                Verdict::Fail { expected, seen } => {
                    write!(
                        f,
                        "{MARK}\tfail\t{number}\t{}\t{}",
                        Field(expected),
                        Field(seen)
                    )
                }
                Verdict::Skip(why) => write!(f, "{MARK}\tskip\t{number}\t{}", Field(why)),
            },
            Self::End => write!(f, "{MARK}\tend"),
        }
    }
}

impl<'a> Record<'a> {
    /// The record in a line without its end; `None` if there is none.
    #[must_use]
    pub fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split('\t');
        let mut next = || fields.next();
        if next()? != MARK {
            return None;
        }
        let ended = |number: &str, verdict| {
            Some(Self::Ended {
                number: number.parse().ok()?,
                verdict,
            })
        };
        let record = match next()? {
            "fact" => Self::Fact {
                name: next()?,
                value: next()?,
            },
            "plan" => Self::Plan {
                first: next()?.parse().ok()?,
                last: next()?.parse().ok()?,
            },
            "case" => Self::Case {
                number: next()?.parse().ok()?,
                name: next()?,
                section: next()?,
            },
            "pass" => ended(next()?, Verdict::Pass)?,
            "fail" => {
                let number = next()?;
                let (expected, seen) = (next()?, next()?);
                ended(number, Verdict::Fail { expected, seen })?
            }
            "skip" => {
                let number = next()?;
                ended(number, Verdict::Skip(next()?))?
            }
            "end" => Self::End,
            _ => return None,
        };
        next().is_none().then_some(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let ended = |verdict| Record::Ended { number: 7, verdict };
        for record in [
            Record::Fact {
                name: "cpu",
                value: "AuthenticAMD, family 15",
            },
            Record::Plan { first: 3, last: 99 },
            Record::Case {
                number: 7,
                name: "event/nmi",
                section: "15.20",
            },
            ended(Verdict::Pass),
            ended(Verdict::Skip("no x")),
            ended(Verdict::Fail {
                expected: "exit 0x72",
                seen: "",
            }),
            Record::End,
        ] {
            assert_eq!(Record::parse(&record.to_string()), Some(record));
        }
    }

    #[test]
    fn control_characters_do_not_break_a_line() {
        let record = Record::Fact {
            name: "a\tb",
            value: "c\nd\r",
        };
        let line = record.to_string();
        let read = Record::Fact {
            name: "a b",
            value: "c d ",
        };
        assert_eq!(Record::parse(&line), Some(read));
    }

    #[test]
    fn other_lines_are_no_records() {
        for line in [
            "",
            "INFO: 1 cores, TSC 2100000 kHz",
            "selftest",
            "selftest\t",
            "selftest\tpass",
            "selftest\tpass\tx",
            "selftest\tpass\t-1",
            "selftest\tpass\t4294967296",
            "selftest\tpass\t1\t2",
            "selftest\tfail\t1\texpected",
            "selftest\tplan\t1",
            "selftest\tend\t",
            "selftest end",
            " selftest\tend",
        ] {
            assert_eq!(Record::parse(line), None, "{line:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_record_that_is_read_is_written_the_same(
            line in "selftest\t(fact|plan|case|pass|fail|skip|end)(\t[0-9a-z\r ]{0,12}){0,4}"
        ) {
            if let Some(record) = Record::parse(&line) {
                let again = record.to_string();
                let clean = |text: &str| text.replace('\r', " ");
                proptest::prop_assert_eq!(
                    Record::parse(&again).map(|it| it.to_string()),
                    Some(clean(&again))
                );
            }
        }
    }
}
